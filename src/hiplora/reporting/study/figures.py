"""Figures of a study: each specification as a plate, for the page and as SVG and PDF files.

The same figure gives the same bytes: no dates, fixed ids. Colours and marks belong to names: draw all figures of a
report with the styles of `report_styles`.
"""

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from hiplora.files import write_atomic
from hiplora.reporting.canvas import Panel, Plate, plate_files
from hiplora.reporting.palette import Look
from hiplora.reporting.study import lines, matrices
from hiplora.reporting.study.checks import check_figure
from hiplora.reporting.study.describe import data_rows
from hiplora.reporting.study.points import limits, undrawn
from hiplora.reporting.study.spec import Figure, Grid, Matrix, Plot
from hiplora.reporting.study.styles import figure_styles, legend_of

Styles = Mapping[str, Look]
FORMATS = ("svg", "pdf")
_WIDTH, _HEIGHT = 640, 380
_PART_WIDTH, _PART_HEIGHT = 370, 270


def plate(figure: Figure, styles: Styles | None = None) -> Plate:
    """Return a figure as a plate of panels with its legend; the parts of a grid have equal axes or shades.

    `styles` has the looks of the report that the figure stands in; without it the figure stands alone.

    Raises:
        ConfigError: lists of a series, or rows of a matrix, are not of one length.
    """
    check_figure(figure)
    styles = figure_styles(figure) if styles is None else styles
    if isinstance(figure, Grid):
        panels = _parts(figure, styles)
    elif isinstance(figure, Plot):
        panels = [lines.panel(figure, styles, _WIDTH, _HEIGHT)]
    else:
        panels = [matrices.panel(figure, _WIDTH)]
    return Plate(figure.name, figure.title, caption(figure), panels, legend_of(figure, styles))


def draw(figure: Figure, styles: Styles | None = None) -> bytes:
    """Return a figure as an SVG file on a white ground, legend included; arguments and errors as `plate`."""
    return plate_files(plate(figure, styles), ("svg",))["svg"]


def save(figure: Figure, folder: str | Path, styles: Styles | None = None) -> list[Path]:
    """Write NAME.svg, NAME.pdf and the figure's data, NAME.csv, into `folder`; return the paths.

    Arguments and errors as `plate`.
    """
    files = plate_files(plate(figure, styles), FORMATS) | {"csv": figure_csv(figure).encode()}
    return [write_atomic(Path(folder) / f"{figure.name}.{kind}", content) for kind, content in files.items()]


def figure_csv(figure: Figure) -> str:
    """Return the data of a figure as CSV, in full precision; what is absent is empty."""
    columns, rows = data_rows(figure)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([["" if value is None else value for value in row] for row in rows])
    return buffer.getvalue()


def caption(figure: Figure) -> str:
    """Return a figure's note, and what its picture leaves out."""
    parts = figure.parts if isinstance(figure, Grid) else [figure]
    plots = [part for part in parts if isinstance(part, Plot)]
    notes = [figure.note, *(part.note for part in parts if part is not figure)]
    hidden = sum(undrawn(plot) for plot in plots)
    if hidden:
        what = "infinite, or at most zero on a logarithmic axis"
        notes.append(f"{hidden} point{'s' if hidden != 1 else ''} cannot be drawn ({what}).")
    most = max(
        (len(series.x) for plot in plots if plot.kind == "points" for series in plot.series), default=0
    )
    if most > lines.MOST_POINTS:
        notes.append(
            f"Of more than {lines.MOST_POINTS:,} points of one series, {lines.MOST_POINTS:,} are drawn."
        )
    return " ".join(dict.fromkeys(filter(None, notes)))


def _parts(grid: Grid, styles: Styles) -> list[Panel]:
    plots = [part for part in grid.parts if isinstance(part, Plot)]
    squares = [part for part in grid.parts if isinstance(part, Matrix)]
    if not grid.parts:
        return [lines.panel(Plot(grid.name, "", "", "", ()), styles, _PART_WIDTH, _PART_HEIGHT)]
    bounds, scale = limits(plots), matrices.shades(squares)
    return [
        lines.panel(part, styles, _PART_WIDTH, _PART_HEIGHT, bounds)
        if isinstance(part, Plot)
        else matrices.panel(part, _PART_WIDTH, scale)
        for part in grid.parts
    ]
