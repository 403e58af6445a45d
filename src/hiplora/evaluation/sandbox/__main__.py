"""Print the guards of this machine: `python -m hiplora.evaluation.sandbox`."""

import sys

from hiplora.errors import HipLoraError
from hiplora.evaluation.sandbox.isolation import guards


def main() -> int:
    """Print a table; the exit status is 0 whether or not guards are missing."""
    try:
        found = guards()
    except HipLoraError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    rows = [
        (guard.name, "active" if guard.active else "missing", guard.stops, guard.reason) for guard in found
    ]
    rows = [("guard", "here", "what it stops", "why it is missing"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
