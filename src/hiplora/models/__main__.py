"""`python -m hiplora.models`: fetch or verify a known model."""

import sys

from hiplora.models import main

if __name__ == "__main__":
    sys.exit(main())
