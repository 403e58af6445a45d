"""The summary in a terminal."""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hiplora.reporting.numbers import MISSING
from hiplora.reporting.results import read_results
from hiplora.reporting.summary import HIGHER, LOWER, method_columns, sections
from hiplora.reporting.verdict import verdict

if TYPE_CHECKING:
    from rich.console import Console

ARROWS = {LOWER: " ↓", HIGHER: " ↑"}


def print_summary(results: Mapping[str, Any], console: "Console | None" = None) -> None:
    """Print the verdict and the summary table of a results dictionary (schema 1).

    The best value of a line is bold where the methods differ by more than a per cent; ↓ and ↑ say which way
    is better. Without a console it prints to standard output.

    Raises:
        DataError: the dictionary is no result, or of another schema.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    read = read_results(results)
    found, said = sections(read), verdict(read)
    out = console or Console(width=None if sys.stdout.isatty() else 120)
    if found:
        table = Table(title=Text(read.title, style="bold"), title_justify="left", header_style="bold")
        table.add_column(Text(read.model))
        columns = method_columns(found)
        for name in columns:
            table.add_column(Text(name), justify="right")
        for section in found:
            table.add_section()
            table.add_row(Text(section.title, style="bold"))
            for row in section.rows:
                label = Text(f"  {row.label}{ARROWS.get(row.better, '')}")
                cells = (
                    Text(row.texts.get(n, MISSING), style="bold" if n in row.best else "") for n in columns
                )
                table.add_row(label, *cells)
        out.print(table)
    out.print(Text(said.headline, style="bold"))
    for sentence in (*said.sentences, *read.notes):
        out.print(Text(sentence))
