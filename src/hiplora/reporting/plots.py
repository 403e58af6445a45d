"""The plots of the reports: each takes a tidy DataFrame and the names of its columns, and returns a Figure.

With `ax` a plot draws there and returns that figure. All know `title`, `xlabel`, `ylabel`, `logx` and `logy`.
"""

import contextlib
import functools
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hiplora.files import write_atomic

STYLE = Path(__file__).with_name("hiplora.mplstyle")
# Methods that most figures show keep one look; the others take what is left, in the order of the rows.
_LOOKS = {
    "HiP-LoRA": ("#0b63a5", "o"),
    "HiP-LoRA (paper)": ("#2f8fc9", "P"),
    "LoRA": ("#cf5300", "s"),
    "LoRA on the MLPs": ("#94690a", "v"),
    "Proj-LoRA": ("#00805c", "^"),
    "base": ("#5a6373", "d"),
}
_OTHERS = (
    ("#a8478a", "D"),
    ("#6250a8", "X"),
    ("#5f6b32", "*"),
    ("#b3354a", "<"),
    ("#3f7f86", ">"),
    ("#7a5a48", "h"),
    ("#1f1f1f", "p"),
    ("#c98a00", "H"),
    ("#8a8f00", "d"),
    ("#e0708f", "8"),
    ("#57a05a", "1"),
    ("#9b8bd6", "2"),
)

Draw = Callable[..., Figure]


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Draw in the project's style inside the block."""
    with matplotlib.style.context(STYLE):
        yield


def svg(figure: Figure) -> str:
    """Return a figure as SVG; the same figure gives the same text."""
    file = io.StringIO()
    with styled():
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def save_figure(figure: Figure, stem: str | os.PathLike) -> Path:
    """Write a figure as `stem.svg` and return the path."""
    return write_atomic(f"{stem}.svg", svg(figure))


def look(name: str, place: int = 0) -> dict[str, Any]:
    """Return colour and marker of a method by its display name; `place` chooses among those of unknown names."""
    color, marker = _LOOKS.get(name, _OTHERS[place % len(_OTHERS)])
    return {"color": color, "marker": marker}


def _plot(draw: Callable[..., None]) -> Draw:
    """Give a drawing function its axes, style and labels, and return the figure."""

    @functools.wraps(draw)
    def plot(
        df: pd.DataFrame,
        *args: Any,
        ax: Axes | None = None,
        title: str = "",
        xlabel: str | None = None,
        ylabel: str | None = None,
        logx: bool = False,
        logy: bool = False,
        size: tuple[float, float] | None = None,
        **options: Any,
    ) -> Figure:
        with styled():
            axes = Figure(figsize=size).subplots() if ax is None else ax
            if logx:
                axes.set_xscale("log")
            if logy:
                axes.set_yscale("log")
            draw(axes, df, *args, **options)
            if title:
                axes.set_title(title)
            if xlabel is not None:
                axes.set_xlabel(xlabel)
            if ylabel is not None:
                axes.set_ylabel(ylabel)
            return axes.figure  # type: ignore[return-value]

    return plot


@_plot
def lines(
    ax: Axes,
    df: pd.DataFrame,
    x: str,
    y: str,
    line: str | None = None,
    *,
    low: str | None = None,
    high: str | None = None,
    markers: bool = True,
) -> None:
    """Draw y over x, one line for each value of `line`, with a band from `low` to `high`."""
    for name, rows, style in _groups(df, line):
        ax.plot(rows[x], rows[y], label=name, **(style if markers else {"color": style["color"]}))
        if low and high:
            ax.fill_between(rows[x], rows[low], rows[high], color=style["color"], alpha=0.15, linewidth=0)
    _finish(ax, x, y, line)


@_plot
def frontier(
    ax: Axes,
    df: pd.DataFrame,
    x: str,
    y: str,
    line: str | None = None,
    *,
    low: str | None = None,
    high: str | None = None,
    x_low: str | None = None,
    x_high: str | None = None,
    label: str | None = None,
) -> None:
    """Draw points joined by a line for each value of `line`, with intervals on both axes and texts at the points."""
    for name, rows, style in _groups(df, line):
        ax.errorbar(
            rows[x],
            rows[y],
            xerr=_margins(rows, x, x_low, x_high),
            yerr=_margins(rows, y, low, high),
            label=name,
            elinewidth=1,
            **style,
        )
        if label:
            for text, place in zip(rows[label], zip(rows[x], rows[y], strict=True), strict=True):
                ax.annotate(str(text), place, xytext=(4, 4), textcoords="offset points", fontsize=8, color="#5a6373")
    _finish(ax, x, y, line)


@_plot
def scatter(
    ax: Axes, df: pd.DataFrame, x: str, y: str, group: str | None = None, *, guides: Sequence[float] = ()
) -> None:
    """Draw a dot a row, coloured by `group`; each of `guides` draws the line y = guide · x."""
    dense = len(df) > 300
    for name, rows, style in _groups(df, group):
        # Pictures of thousands of dots are megabytes as vectors.
        ax.scatter(
            rows[x], rows[y], label=name, s=8 if dense else 22, alpha=0.4 if dense else 0.8, linewidths=0,
            rasterized=dense, **style,
        )  # fmt: skip
    span = np.array([df[x].min(), df[x].max()])
    for guide in guides:
        ax.plot(span, guide * span, color="#9aa3b0", linewidth=1, linestyle=":")
        ax.annotate(f"{guide:.0%}", (span[1], guide * span[1]), fontsize=8, color="#5a6373", va="center")
    _finish(ax, x, y, group)


@_plot
def bars(
    ax: Axes,
    df: pd.DataFrame,
    value: str,
    label: str,
    group: str | None = None,
    *,
    low: str | None = None,
    high: str | None = None,
    reference: float | None = None,
    digits: int = 3,
) -> None:
    """Draw horizontal bars with their values, one for each row, those of one `label` together."""
    places, height = _places(ax, df, label, group)
    for name, rows, style in _groups(df, group):
        drawn = ax.barh(
            places.loc[rows.index],
            rows[value],
            height,
            label=name,
            color=style["color"],
            xerr=_margins(rows, value, low, high),
            ecolor="#5a6373",
        )
        ax.bar_label(drawn, [f"{number:.{digits}g}" for number in rows[value]], padding=3, fontsize=8, color="#5a6373")
    if ax.get_xscale() == "linear":
        ax.margins(x=0.15)
        ax.locator_params(axis="x", nbins=6)
    if reference is not None:
        ax.axvline(reference, color="#5a6373", linewidth=1, linestyle="--")
    ax.grid(False, axis="y")
    _finish(ax, value, "", group)


@_plot
def heatmap(
    ax: Axes,
    table: pd.DataFrame,
    *,
    center: float | None = None,
    fmt: str = ".2g",
    vmin: float | None = None,
    vmax: float | None = None,
    colorbar: str = "",
) -> None:
    """Draw a wide table as coloured cells, with their values where there is room.

    With `center` the colours diverge from there: blue above, red below.
    """
    values = table.to_numpy(dtype=float)
    colors = "Blues" if center is None else "RdBu"
    if center is not None:
        reach = float(np.nanmax(np.abs(values - center), initial=0.0)) or 1.0
        vmin, vmax = center - reach if vmin is None else vmin, center + reach if vmax is None else vmax
    image = ax.imshow(values, cmap=colors, vmin=vmin, vmax=vmax, aspect="auto")
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.set_xticks(*_ticks(table.columns, 16), rotation=0 if max(len(str(c)) for c in table.columns) < 8 else 30)
    ax.set_yticks(*_ticks(table.index, 40))
    if values.size <= 150:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                red, green, blue, _ = image.cmap(image.norm(value))
                dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
                color = "white" if dark else "#1d2230"
                ax.text(column, row, format(value, fmt), ha="center", va="center", fontsize=8, color=color)
    if values.size > 150 or colorbar:
        ax.figure.colorbar(image, ax=ax, label=colorbar)


def facets(
    df: pd.DataFrame,
    by: str,
    plot: Draw,
    *,
    columns: int = 3,
    share: bool = True,
    height: float = 2.9,
    **options: Any,
) -> Figure:
    """Return one figure with a panel for each value of `by`, drawn by one of this module's plots."""
    names = list(dict.fromkeys(df[by]))
    columns = min(columns, len(names))
    rows = -(-len(names) // columns)
    with styled():
        figure = Figure(figsize=(3.4 * columns + 0.6, height * rows + 0.5))
        grid = figure.subplots(rows, columns, sharex=share, sharey=share, squeeze=False)
    for place, ax in enumerate(grid.flat):
        if place >= len(names):
            ax.set_visible(False)
            continue
        plot(df[df[by] == names[place]], ax=ax, title=str(names[place]), **options)
        ax.label_outer()
    with styled():
        _legend(figure.axes[0])
    return figure


def _groups(df: pd.DataFrame, group: str | None) -> Iterable[tuple[str | None, pd.DataFrame, dict[str, Any]]]:
    if group is None:
        yield None, df, look("HiP-LoRA")
        return
    names = list(dict.fromkeys(df[group]))
    unknown = [name for name in names if name not in _LOOKS]
    for name in names:
        yield str(name), df[df[group] == name], look(name, unknown.index(name) if name in unknown else 0)


def _margins(rows: pd.DataFrame, value: str, low: str | None, high: str | None) -> np.ndarray | None:
    if low is None or high is None:
        return None
    bounds = np.stack([rows[value] - rows[low], rows[high] - rows[value]]).astype(float)
    return np.nan_to_num(bounds).clip(min=0)


def _places(ax: Axes, df: pd.DataFrame, label: str, group: str | None) -> tuple[pd.Series, float]:
    """Vertical place of each row, from the top, and the height of a bar; the figure grows with the rows."""
    labels = list(dict.fromkeys(df[label]))
    groups = list(dict.fromkeys(df[group])) if group else [None]
    height = 0.8 / len(groups)
    offset = [groups.index(name) for name in df[group]] if group else 0
    places = df[label].map(labels.index) - 0.4 + height * (np.asarray(offset) + 0.5)
    ax.set_yticks(range(len(labels)), [str(name) for name in labels])
    ax.set_ylim(len(labels) - 0.4, -0.6)
    if len(ax.figure.axes) == 1:
        ax.figure.set_figheight(max(1.8, 0.9 + 0.24 * len(labels) * max(1.4, len(groups)) + 0.12 * len(groups)))  # type: ignore[union-attr]
    return places, height * 0.9


def _ticks(names: pd.Index, most: int) -> tuple[list[int], list[str]]:
    step = -(-len(names) // most)
    return list(range(0, len(names), step)), [str(name) for name in names[::step]]


def _finish(ax: Axes, x: str, y: str, group: str | None) -> None:
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    if group is not None and len(ax.figure.axes) == 1:
        _legend(ax)


def _legend(ax: Axes) -> None:
    """Put the legend above the panels, where it hides nothing."""
    handles, labels = ax.get_legend_handles_labels()
    if len(labels) > 1:
        ax.figure.legend(handles, labels, loc="outside upper left", ncols=2 if len(labels) < 9 else 3)
