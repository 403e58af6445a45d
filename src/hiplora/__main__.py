"""`python -m hiplora` is the `hiplora` command."""

from hiplora.cli.main import main

if __name__ == "__main__":
    main()
