"""What the commands share: options, JSON and tables on stdout."""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    import pandas as pd

OUT_OPTION = typer.Option(..., "--out", help="Output folder; it must not exist yet.")
OVERWRITE_OPTION = typer.Option(False, "--overwrite", help="Replace the output folder if it exists.")
JSON_OPTION = typer.Option(False, "--json", help="Print one JSON object instead of a table.")
DEVICE_OPTION = typer.Option("auto", "--device", help="auto (a GPU if there is one), cpu, cuda, …")
SCALE_OPTION = typer.Option(None, "--scale", help="Multiply the update by this number, for example 0.75.")
TOLERANCE_OPTION = typer.Option(
    None, "--tolerance", help="Search the smallest scale that raises the loss on --data by so many nats at most."
)
DATA_OPTION = typer.Option(None, "--data", help="Rows of the task that the adapter was not trained on.")


def emit_json(value: Any) -> None:
    """Print one JSON value to standard output."""
    typer.echo(json.dumps(value, indent=2, default=str))


def tell(text: str) -> None:
    """Print a line about the work to standard error."""
    typer.echo(text, err=True)


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
