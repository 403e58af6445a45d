"""What the commands share: options, JSON and tables on stdout, progress on stderr."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import typer

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")

OUT_OPTION = typer.Option(..., "--out", help="Output folder; it must not exist yet.")
OVERWRITE_OPTION = typer.Option(False, "--overwrite", help="Replace the output folder if it exists.")
JSON_OPTION = typer.Option(False, "--json", help="Print one JSON object instead of a table.")
DEVICE_OPTION = typer.Option("cpu", "--device", help="Device to compute on: cpu, cuda, …")


def emit_json(value: Any) -> None:
    """Print one JSON value to standard output."""
    typer.echo(json.dumps(value, indent=2, default=str))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table to standard output, brackets taken literally; columns after the first are right-aligned."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = [[str(cell) for cell in row] for row in rows]
    table = Table(title=Text(title), title_justify="left")
    for index, column in enumerate(columns):
        # Names stay whole where the numbers' headings can wrap instead.
        width = min(24, max((len(row[0]) for row in rows), default=0)) if index == 0 else None
        table.add_column(Text(column), justify="right" if index else "left", min_width=width)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def print_frame(title: str, df: "pd.DataFrame") -> None:
    """Print a DataFrame to standard output, formatted as in the reports."""
    from hiplora.reporting import formatted

    text = formatted(df)
    print_table(title, list(text.columns), text.to_numpy().tolist())


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Yield `items` under a progress bar on stderr; silent where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, description=what, total=total, console=Console(stderr=True))


@contextlib.contextmanager
def counted() -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Yield `start(what, total)`, which opens a progress bar on stderr and returns `advance(done)`.

    Silent where stderr is not a terminal.
    """
    if not sys.stderr.isatty():
        yield lambda what, total: lambda done: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(file=sys.stderr)) as bars:

        def start(what: str, total: int) -> Callable[[int], None]:
            bar = bars.add_task(what, total=total)
            return lambda done: bars.advance(bar, done)

        yield start
