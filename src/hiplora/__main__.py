"""The `hiplora` command, also as `python -m hiplora`."""

import sys

from hiplora.extras import missing


def main() -> None:
    """Run the command line; without the libraries that it needs, name the extra that brings them."""
    try:
        from hiplora.cli.main import main as run
    except ModuleNotFoundError as error:
        if (error.name or "hiplora").startswith("hiplora"):
            raise
        sys.exit(f"error: {missing(str(error.name))}")
    run()


if __name__ == "__main__":
    main()
