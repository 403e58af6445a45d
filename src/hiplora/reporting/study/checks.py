"""Specifications that cannot be shown: each is refused with what is wrong, where, and the way out."""

import re
from collections.abc import Sequence

from hiplora.errors import ConfigError
from hiplora.reporting.study.spec import Figure, Grid, Matrix, Plot, Section, Table

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


def check_names(sections: Sequence[Section]) -> None:
    """Raise a ConfigError if a name cannot be a file's name, or two tables, figures or sections share one."""
    for kind, names in (
        ("section", [section.name for section in sections]),
        ("table", [table.name for section in sections for table in section.tables]),
        ("figure", [figure.name for section in sections for figure in section.figures]),
    ):
        for place, name in enumerate(names):
            if not _NAME.fullmatch(name):
                raise ConfigError(
                    f"{kind} {name!r}: its name is that of its files; use lower case, digits, dashes"
                )
            if name in names[:place]:
                raise ConfigError(
                    f"{kind} {name!r}: two have this name, and their files would be one; rename one"
                )


def check_table(table: Table) -> None:
    """Raise a ConfigError if a row of the table does not have one cell for each column after the first."""
    for name, cells in table.rows:
        if len(cells) != len(table.columns) - 1:
            raise ConfigError(
                f"table {table.name}, row {name!r}: {len(cells)} cells for {len(table.columns) - 1} columns after "
                f"{table.columns[0] if table.columns else 'none'!r}; give one for each, Cell() where nothing is known"
            )


def check_figure(figure: Figure) -> None:
    """Raise a ConfigError if a figure's lists are not of one length, or a matrix does not have its names' shape."""
    if isinstance(figure, Grid):
        for part in figure.parts:
            check_figure(part)
    elif isinstance(figure, Plot):
        _check_plot(figure)
    else:
        _check_matrix(figure)


def _check_plot(plot: Plot) -> None:
    for series in plot.series:
        for name in ("y", "low", "high", "x_low", "x_high", "labels"):
            values = getattr(series, name)
            absent = values is None or (name == "labels" and not values)
            if not absent and len(values) != len(series.x):
                raise ConfigError(
                    f"figure {plot.name}, series {series.name!r}: {len(values)} values in {name} for "
                    f"{len(series.x)} in x; give one for each, NaN where there is none"
                )


def _check_matrix(matrix: Matrix) -> None:
    if len(matrix.values) != len(matrix.row_names):
        raise ConfigError(
            f"figure {matrix.name}: {len(matrix.values)} rows of values for {len(matrix.row_names)} row names; "
            "give one for each"
        )
    for name, values in zip(matrix.row_names, matrix.values, strict=True):
        if len(values) != len(matrix.column_names):
            raise ConfigError(
                f"figure {matrix.name}, row {name!r}: {len(values)} values for {len(matrix.column_names)} columns; "
                "give one for each, None where there is none"
            )
