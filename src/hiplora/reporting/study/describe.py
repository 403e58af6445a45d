"""A figure in words, for readers who cannot see it, and as rows of its data."""

import textwrap
from collections.abc import Sequence

from hiplora.reporting.numbers import finite, number, printable, significant
from hiplora.reporting.study.checks import check_figure
from hiplora.reporting.study.spec import Figure, Grid, Matrix, Plot, Series
from hiplora.reporting.study.styles import shown_name

Value = str | float | None
_TITLE_CHARACTER = 8.4  # CSS pixels of the title's font


def wrapped(title: str, width: int) -> str:
    """Return a title in lines that fit a picture of `width` CSS pixels."""
    return "\n".join(textwrap.wrap(printable(title), max(12, int((width - 16) / _TITLE_CHARACTER))))


def describe(figure: Figure) -> str:
    """Say in words what a figure shows, a part after the other."""
    if isinstance(figure, Grid):
        return " ".join(f"{part.title}: {describe(part)}" for part in figure.parts) or "No data."
    return describe_plot(figure) if isinstance(figure, Plot) else describe_matrix(figure)


def describe_plot(plot: Plot) -> str:
    """Say in words what a plot shows: its axes and, of each series, how many points and from where to where."""
    said = [_series_words(series) for series in plot.series]
    return f"{printable(plot.y_label)} against {printable(plot.x_label)}. " + (" ".join(said) or "No data.")


def describe_matrix(matrix: Matrix) -> str:
    """Say in words what a matrix shows: row by row, what is there."""
    rows = []
    for name, values in zip(matrix.row_names, matrix.values, strict=False):
        there = [
            f"{printable(column)} {significant(number(value))}"
            for column, value in zip(matrix.column_names, values, strict=False)
            if number(value) is not None
        ]
        rows.append(f"{printable(name)}: {', '.join(there) or 'nothing'}.")
    unit = f"In {printable(matrix.unit)}. " if matrix.unit else ""
    return unit + (" ".join(rows) or "No data.")


def data_rows(figure: Figure) -> tuple[list[str], list[list[Value]]]:
    """Return the data of a figure as names of columns and rows of values, nothing rounded and nothing left out.

    Raises:
        ConfigError: lists of a series, or rows of a matrix, are not of one length.
    """
    check_figure(figure)
    if isinstance(figure, Grid):
        return _grid_rows(figure)
    return _plot_rows(figure) if isinstance(figure, Plot) else _matrix_rows(figure)


def _series_words(series: Series) -> str:
    name = printable(shown_name(series))
    shown = [
        (x, y)
        for x, y in zip(series.x, series.y, strict=False)
        if number(x) is not None and number(y) is not None
    ]
    if not shown:
        return f"{name}: no points."
    if len(shown) <= 4:
        return f"{name}: " + ", ".join(f"{significant(y)} at {significant(x)}" for x, y in shown) + "."
    ys = finite(y for _, y in shown) or [float("nan")]
    return (
        f"{name}: {len(shown)} points, from {significant(shown[0][1])} at {significant(shown[0][0])} to "
        f"{significant(shown[-1][1])} at {significant(shown[-1][0])}, lowest {significant(min(ys))}, highest "
        f"{significant(max(ys))}."
    )


def _plot_rows(plot: Plot) -> tuple[list[str], list[list[Value]]]:
    bounds = [
        (name, key)
        for name, key in (
            (f"{plot.y_label}, low", "low"),
            (f"{plot.y_label}, high", "high"),
            (f"{plot.x_label}, low", "x_low"),
            (f"{plot.x_label}, high", "x_high"),
        )
        if any(getattr(series, key) is not None for series in plot.series)
    ]
    labelled = any(series.labels for series in plot.series)
    columns = [
        "series",
        *(["point"] if labelled else []),
        plot.x_label,
        plot.y_label,
        *(name for name, _ in bounds),
    ]
    rows: list[list[Value]] = []
    for series in plot.series:
        for place, x in enumerate(series.x):
            label: list[Value] = [series.labels[place] if series.labels else ""] if labelled else []
            ends = [_at(getattr(series, key), place) for _, key in bounds]
            rows.append([shown_name(series), *label, number(x), number(series.y[place]), *ends])
    return columns, rows


def _matrix_rows(matrix: Matrix) -> tuple[list[str], list[list[Value]]]:
    rows: list[list[Value]] = [
        [name, *(number(value) for value in values)]
        for name, values in zip(matrix.row_names, matrix.values, strict=True)
    ]
    return ["", *matrix.column_names], rows


def _grid_rows(grid: Grid) -> tuple[list[str], list[list[Value]]]:
    """Return the parts' rows below each other, with the part's title in front; parts may have other columns."""
    tables = [(part.title, *data_rows(part)) for part in grid.parts]
    columns = list(dict.fromkeys(column for _, names, _ in tables for column in names))
    rows = [
        [title, *(dict(zip(names, row, strict=True)).get(column) for column in columns)]
        for title, names, part_rows in tables
        for row in part_rows
    ]
    return ["part", *columns], rows


def _at(values: Sequence[float] | None, place: int) -> float | None:
    return None if values is None else number(values[place])
