"""The plots of the reports: each takes a tidy DataFrame and the names of its columns, and returns a Figure.

With `ax` a plot draws there and returns that figure. All know `title`, `xlabel`, `ylabel`, `logx` and `logy`.
"""

import functools
import io
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hiplora.extras import require

require("reports")

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hiplora.files import write_atomic

STYLE = Path(__file__).with_name("hiplora.mplstyle")
# Methods that most figures show keep one look; the others take the remaining ones, in the order of the rows.
_LOOKS = {
    "HiP-LoRA": ("#0b63a5", "o"),
    "HiP-LoRA (paper)": ("#2f8fc9", "P"),
    "LoRA": ("#cf5300", "s"),
    "LoRA on the MLPs": ("#94690a", "v"),
    "Proj-LoRA": ("#00805c", "^"),
    "base": ("#5a6373", "d"),
}
_COLORS = "#a8478a #6250a8 #5f6b32 #b3354a #3f7f86 #7a5a48 #1f1f1f #c98a00 #8a8f00 #e0708f #57a05a #9b8bd6"
_OTHERS = tuple(zip(_COLORS.split(), "DX*<>hpHd812", strict=True))

Look = dict[str, Any]  # colour and marker, as matplotlib takes them
styled = functools.partial(matplotlib.style.context, STYLE)  # draws in the project's style inside the block


def svg(figure: Figure) -> str:
    """Return a figure as SVG; the same figure gives the same text."""
    file = io.StringIO()
    with styled():
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def save_figure(figure: Figure, stem: str | os.PathLike) -> Path:
    """Write a figure as `stem.svg` and return the path."""
    return write_atomic(f"{stem}.svg", svg(figure))


def look(name: str, number: int = 0) -> Look:
    """Return colour and marker of a method by its display name; `number` chooses among those of unknown names."""
    color, marker = _LOOKS.get(name, _OTHERS[number % len(_OTHERS)])
    return {"color": color, "marker": marker}


def _plot(draw: Callable[..., None]) -> Callable[..., Figure]:
    """Give a drawing function its axes, style and labels, and return the figure."""

    @functools.wraps(draw)
    def plot(df: pd.DataFrame, *args: Any, ax: Axes | None = None, **options: Any) -> Figure:
        scales: dict[str, Any] = {f"{axis}scale": "log" for axis in "xy" if options.pop(f"log{axis}", False)}
        labels = {name: options.pop(name) for name in ("title", "xlabel", "ylabel") if name in options}
        with styled():
            axes = ax or Figure().subplots()
            axes.set(**scales)
            draw(axes, df, *args, **options)
            axes.set(**labels)
            return axes.figure  # type: ignore[return-value]

    return plot


@_plot
def lines(
    ax: Axes,
    df: pd.DataFrame,
    x: str,
    y: str,
    line: str,
    *,
    low: str | None = None,
    high: str | None = None,
    x_low: str | None = None,
    x_high: str | None = None,
    label: str | None = None,
    markers: bool = True,
    looks: Mapping[str, Look] | None = None,
) -> None:
    """Draw points joined by a line for each value of `line`, with intervals on both axes and texts at the points."""
    for name, rows, style in _groups(df, line, looks):
        style = style if markers else {"color": style["color"], "marker": ""}
        x_margins, y_margins = _margins(rows, x, x_low, x_high), _margins(rows, y, low, high)
        ax.errorbar(rows[x], rows[y], xerr=x_margins, yerr=y_margins, label=name, elinewidth=1, **style)
        if label:
            for text, point in zip(rows[label], zip(rows[x], rows[y], strict=True), strict=True):
                ax.annotate(str(text), point, xytext=(4, 4), textcoords="offset points", fontsize=8, color="#5a6373")
    _finish(ax, x, y)


@_plot
def scatter(
    ax: Axes,
    df: pd.DataFrame,
    x: str,
    y: str,
    group: str | None = None,
    *,
    guides: Sequence[float] = (),
    looks: Mapping[str, Look] | None = None,
) -> None:
    """Draw a dot a row, coloured by `group`; each of `guides` draws the line y = guide · x."""
    dense = len(df) > 300
    for name, rows, style in _groups(df, group, looks):
        # Pictures of thousands of dots are megabytes as vectors.
        ax.scatter(
            rows[x], rows[y], label=name, s=8 if dense else 22, alpha=0.4 if dense else 0.8, linewidths=0,
            rasterized=dense, **style,
        )  # fmt: skip
    span = np.array([df[x].min(), df[x].max()])
    for guide in guides:
        ax.plot(span, guide * span, color="#9aa3b0", linewidth=1, linestyle=":")
        ax.annotate(f"{guide:.0%}", (span[1], guide * span[1]), fontsize=8, color="#5a6373", va="center")
    _finish(ax, x, y)


@_plot
def heatmap(ax: Axes, table: pd.DataFrame, *, vmin: float | None = None, vmax: float | None = None) -> None:
    """Draw a wide table as coloured cells, with their values where there is room."""
    values = table.to_numpy(dtype=float)
    image = ax.imshow(values, vmin=vmin, vmax=vmax, aspect="auto")
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.set_xticks(*_ticks(table.columns, 16), rotation=0 if max(len(str(c)) for c in table.columns) < 8 else 30)
    ax.set_yticks(*_ticks(table.index, 40))
    if values.size > 150:
        ax.figure.colorbar(image, ax=ax)
        return
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            color = "white" if float(image.norm(value)) > 0.5 else "#1d2230"  # type: ignore[arg-type]
            ax.text(column, row, format(value, ".2g"), ha="center", va="center", fontsize=8, color=color)


def facets(df: pd.DataFrame, by: str, plot: Callable[..., Figure], **options: Any) -> Figure:
    """Return one figure with a panel for each value of `by`, three in a row, drawn by one of this module's plots.

    What the plot groups by looks the same in all panels.
    """
    if group := options.get("line") or options.get("group"):
        options["looks"] = _looks(df[group])
    panels = list(df.groupby(by, sort=False, dropna=False))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with styled():
        figure = Figure(figsize=(3.4 * columns + 0.6, 2.9 * rows + 0.5))
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for ax in grid.flat[len(panels) :]:
            ax.set_visible(False)
        for (name, part), ax in zip(panels, grid.flat, strict=False):
            plot(part, ax=ax, title=str(name), **options)
            ax.label_outer()
        _legend(figure)
    return figure


def _looks(names: pd.Series) -> dict[str, Look]:
    others = itertools.count()
    return {str(name): look(str(name), 0 if name in _LOOKS else next(others)) for name in names.unique()}


def _groups(
    df: pd.DataFrame, group: str | None, looks: Mapping[str, Look] | None
) -> Iterable[tuple[str | None, pd.DataFrame, Look]]:
    if group is None:
        yield None, df, look("HiP-LoRA")
        return
    looks = looks or _looks(df[group])
    for name, rows in df.groupby(group, sort=False, dropna=False):
        yield str(name), rows, looks[str(name)]


def _margins(rows: pd.DataFrame, value: str, low: str | None, high: str | None) -> np.ndarray | None:
    if low is None or high is None:
        return None
    bounds = np.stack([rows[value] - rows[low], rows[high] - rows[value]]).astype(float)
    return np.nan_to_num(bounds).clip(min=0)


def _ticks(names: pd.Index, most: int) -> tuple[list[int], list[str]]:
    step = -(-len(names) // most)
    return list(range(0, len(names), step)), [str(name) for name in names[::step]]


def _finish(ax: Axes, x: str, y: str) -> None:
    ax.set(xlabel=x, ylabel=y)
    if len(ax.figure.axes) == 1:
        _legend(ax.figure)


def _legend(figure: Any) -> None:
    """Put one legend above the panels, where it hides nothing, and make the figure higher by its rows after two."""
    handles: dict[str, Any] = {}
    for ax in figure.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    labels = list(handles)
    if len(labels) > 1:
        columns = 3 if len(labels) > 8 and max(map(len, labels)) < 18 else 2
        figure.legend(handles.values(), labels, loc="outside upper left", ncols=columns)
        figure.set_figheight(figure.get_figheight() + 0.19 * max(0, -(-len(labels) // columns) - 2))
