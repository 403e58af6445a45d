"""Lines and clouds of points over two axes, with their intervals."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from hiplora.reporting._old_plots.spectrum import log_ticks
from hiplora.reporting.canvas import Panel, dress
from hiplora.reporting.numbers import fixed, significant
from hiplora.reporting.palette import MUTED, PAPER, Look
from hiplora.reporting.study import labels
from hiplora.reporting.study.describe import describe_plot, wrapped
from hiplora.reporting.study.points import Limits, Point, limits, points
from hiplora.reporting.study.spec import Plot, Series
from hiplora.reporting.study.styles import look_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

MOST_POINTS = 1500  # of one series; beyond it they are thinned evenly, to keep the page small
_BARS_UP_TO = 12  # points of a line; beyond it the intervals are a band
_DOTS_FROM = 200  # points of a cloud; from there on they are small dots without a shape
_DODGE = 4.0  # CSS pixels between the bars of two lines at one x
_PER_PATH = 90

Bounds = tuple[Limits, Limits] | None


def panel(plot: Plot, styles: Mapping[str, Look], width: int, height: int, shared: Bounds = None) -> Panel:
    """Return the picture of a plot; `shared` are the limits of its axes where other plots stand beside it."""
    bounds = shared or limits([plot])
    ordered = sorted(
        plot.series, key=lambda series: series.paper
    )  # the paper's on top, where they can be seen

    def draw(container: "FigureBase") -> None:
        ax = container.subplots()
        dress(ax, plot.x_label, plot.y_label, grid="both")
        drawn = [(series, points(series, plot)) for series in ordered]
        _scale(
            ax,
            plot,
            bounds,
            whole=all(point.x.is_integer() for _, found in drawn for point in found if point),
        )
        shifts = _shifts(plot, drawn)
        for (series, found), shift in zip(drawn, shifts, strict=True):
            _draw(ax, plot, found, look_of(series, styles), shift)
        if not any(point for _, found in drawn for point in found):
            ax.text(
                0.5,
                0.5,
                "nothing measured yet",
                transform=ax.transAxes,
                color=MUTED,
                ha="center",
                va="center",
            )
        _write_labels(ax, drawn, styles)

    return Panel(plot.name, wrapped(plot.title, width), describe_plot(plot), draw, width, height)


def _scale(ax: "Axes", plot: Plot, bounds: Bounds, whole: bool) -> None:
    """Set up the axes; `whole` says that all x are whole numbers, between which there is nothing to mark."""
    if plot.x_log:
        ax.set_xscale("log")
    if plot.y_log:
        ax.set_yscale("log")
    if bounds is None:
        ax.set_xticks([])
        ax.set_yticks([])
        return
    ax.set_xlim(bounds[0])
    ax.set_ylim(bounds[1])
    for axis, log, integer in ((ax.xaxis, plot.x_log, whole), (ax.yaxis, plot.y_log, False)):
        if log:
            log_ticks(axis)
        else:
            _plain_ticks(axis, integer)


def _plain_ticks(axis: Any, integer: bool) -> None:
    """As many decimals as the ticks need, thousands apart from each other, no offset beside the axis."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=integer, min_n_ticks=1))
    ticks = axis.get_majorticklocs()
    step = abs(ticks[1] - ticks[0]) if len(ticks) > 1 else 1.0
    decimals = max(0, -math.floor(math.log10(step) + 1e-9) + (f"{step:e}".startswith("2.5")))

    def text(value: float, _: object) -> str:
        if abs(value) < step / 1e6:  # where rounding has made zero something tiny
            value = 0.0
        return significant(value) if step >= 1e6 or decimals > 5 else fixed(value, decimals)

    axis.set_major_formatter(FuncFormatter(text))


def _shifts(plot: Plot, drawn: Sequence[tuple[Series, Sequence[Point | None]]]) -> list[float]:
    """Return how far each series is moved sideways, in pixels, so that error bars at one x stand side by side."""
    barred = [
        place
        for place, (_, found) in enumerate(drawn)
        if _has_bars(found) and plot.kind == "lines" and not _wide(found)
    ]
    xs = [{point.x for point in drawn[place][1] if point} for place in barred]
    meet = any(xs[one] & xs[other] for one in range(len(xs)) for other in range(one))
    if not meet:
        return [0.0] * len(drawn)
    return [
        _DODGE * (barred.index(place) - (len(barred) - 1) / 2) if place in barred else 0.0
        for place in range(len(drawn))
    ]


def _has_bars(found: Sequence[Point | None]) -> bool:
    return len(found) <= _BARS_UP_TO and any(point and point.low is not None for point in found)


def _wide(found: Sequence[Point | None]) -> bool:
    return any(point and point.x_low is not None for point in found)


def _draw(ax: "Axes", plot: Plot, found: Sequence[Point | None], look: Look, shift: float) -> None:
    move = _moved(ax, shift)
    present = [point for point in found if point is not None]
    if plot.kind == "points" and len(present) >= _DOTS_FROM:
        _cloud(ax, present, look)
        return
    if plot.kind == "lines" and len(found) > _BARS_UP_TO:
        _band(ax, found, look)
    else:
        _bars(ax, present, look, move)
    xs = [point.x if point else math.nan for point in found]
    ys = [point.y if point else math.nan for point in found]
    joined = plot.kind == "lines"
    # Markers on a long line hide it: a few of them, evenly, are enough to tell it from the others.
    every = max(1, len(found) // 12) if joined else None
    (line,) = ax.plot(
        xs, ys, transform=move, color=look.colour, linewidth=2.0 if joined else 0, marker=look.marker, markevery=every,
        markersize=6.5, markerfacecolor=PAPER if look.hollow else look.colour, markeredgecolor=look.colour,
        markeredgewidth=1.5 if look.hollow else 0.8, zorder=4 if look.hollow else 3,
    )  # fmt: skip
    if joined and look.dashes:
        line.set_dashes(look.dashes)


def _moved(ax: "Axes", shift: float) -> Any:
    """Return the transform of the axes' data with a shift to the right in CSS pixels."""
    from matplotlib.transforms import ScaledTranslation

    figure = ax.get_figure(root=True)
    if not shift or figure is None:
        return ax.transData
    return ax.transData + ScaledTranslation(shift / 72, 0, figure.dpi_scale_trans)


def _bars(ax: "Axes", present: Sequence[Point], look: Look, move: Any) -> None:
    """Draw intervals from bound to bound: a percentile interval need not hold its point."""
    style = {"color": look.colour, "linewidth": 1.3, "alpha": 0.8, "transform": move, "zorder": 2}
    caps = {**style, "linestyle": "none", "markersize": 7, "markeredgewidth": 1.3}
    bottom, left = _floor(ax, "y"), _floor(ax, "x")
    tall = [
        (point.x, max(point.low, bottom), point.high)
        for point in present
        if point.low is not None and point.high is not None
    ]
    wide = [
        (point.y, max(point.x_low, left), point.x_high)
        for point in present
        if point.x_low is not None and point.x_high is not None
    ]
    if tall:
        xs = [value for x, _, _ in tall for value in (x, x, math.nan)]
        ys = [value for _, low, high in tall for value in (low, high, math.nan)]
        ax.plot(xs, ys, **style)
        ax.plot(xs, ys, marker="_", **caps)
    if wide:
        xs = [value for _, low, high in wide for value in (low, high, math.nan)]
        ys = [value for y, _, _ in wide for value in (y, y, math.nan)]
        ax.plot(xs, ys, **style)
        ax.plot(xs, ys, marker="|", **caps)


def _floor(ax: "Axes", axis: Literal["x", "y"]) -> float:
    """Return the least value that can be drawn: a logarithmic axis has an end, a linear one none."""
    scale, (low, _) = (ax.get_xscale(), ax.get_xlim()) if axis == "x" else (ax.get_yscale(), ax.get_ylim())
    return low if scale == "log" else -math.inf


def _band(ax: "Axes", found: Sequence[Point | None], look: Look) -> None:
    bottom = _floor(ax, "y")
    lows = [math.nan if point is None or point.low is None else max(point.low, bottom) for point in found]
    highs = [math.nan if point is None or point.high is None else point.high for point in found]
    if all(map(math.isnan, lows)):
        return
    xs = [point.x if point else math.nan for point in found]
    ax.fill_between(xs, lows, highs, color=look.colour, alpha=0.16, linewidth=0, zorder=1)


def _cloud(ax: "Axes", present: Sequence[Point], look: Look) -> None:
    """Draw many points as very short round strokes: a tenth of the size of one SVG element per point."""
    thinned = present
    if len(present) > MOST_POINTS:
        ordered = sorted(present, key=lambda point: (point.x, point.y))
        thinned = [ordered[place * len(ordered) // MOST_POINTS] for place in range(MOST_POINTS)]
    xs = [value for point in thinned for value in (point.x, point.x * 1.0005, math.nan)]
    ys = [value for point in thinned for value in (point.y, point.y, math.nan)]
    for start in range(0, len(xs), _PER_PATH):
        ax.plot(xs[start : start + _PER_PATH], ys[start : start + _PER_PATH], color=look.colour, alpha=0.4,
                linewidth=3.6, solid_capstyle="round", snap=False)  # fmt: skip


def _write_labels(
    ax: "Axes", drawn: Sequence[tuple[Series, Sequence[Point | None]]], styles: Mapping[str, Look]
) -> None:
    wanted = [
        (point.x, point.y, point.label, look_of(series, styles).colour)
        for series, found in drawn
        for point in found
        if point is not None and point.label
    ]
    if wanted:
        labels.write(ax, wanted, [line for _, found in drawn for line in _strokes(found)])


def _strokes(found: Sequence[Point | None]) -> list[list[tuple[float, float]]]:
    """Return what is drawn of a series, stroke by stroke: its line and its error bars."""
    strokes = [[(point.x, point.y) for point in found if point]]
    for point in found:
        if point and point.low is not None and point.high is not None:
            strokes.append([(point.x, point.low), (point.x, point.high)])
        if point and point.x_low is not None and point.x_high is not None:
            strokes.append([(point.x_low, point.y), (point.x_high, point.y)])
    return strokes
