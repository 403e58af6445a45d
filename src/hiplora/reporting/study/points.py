"""The points of a series as they can be drawn, and the limits of the axes that hold them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hiplora.reporting.numbers import number
from hiplora.reporting.study.spec import Plot, Series

Limits = tuple[float, float]


@dataclass(frozen=True)
class Point:
    """A point with the bounds of its intervals; all finite, bounds None where there are none."""

    x: float
    y: float
    low: float | None
    high: float | None
    x_low: float | None
    x_high: float | None
    label: str


def points(series: Series, plot: Plot) -> list[Point | None]:
    """Return a series' points in order, None for each that cannot be drawn (absent, NaN, infinite, ≤ 0 on a log axis).

    A bound may be at or below zero on a logarithmic axis: it is then beyond the axis' end.
    """
    count = len(series.x)
    found: list[Point | None] = []
    for place in range(count):
        x, y = _on_axis(series.x[place], plot.x_log), _on_axis(series.y[place], plot.y_log)
        if x is None or y is None:
            found.append(None)
            continue
        low, high, x_low, x_high = (
            None if bounds is None else _on_axis(bounds[place], log=False)
            for bounds in (series.low, series.high, series.x_low, series.x_high)
        )
        label = series.labels[place] if series.labels else ""
        found.append(Point(x, y, low, high, x_low, x_high, label))
    return found


def undrawn(plot: Plot) -> int:
    """Return how many points with numbers a plot cannot show: infinite ones, or at most zero on a log axis."""
    return sum(
        point is None and number(x) is not None and number(y) is not None
        for series in plot.series
        for point, x, y in zip(points(series, plot), series.x, series.y, strict=True)
    )


def limits(plots: Sequence[Plot]) -> tuple[Limits, Limits] | None:
    """Return the limits of x and y that hold all points and intervals of plots of one kind, or None without points."""
    shown = [
        point
        for plot in plots
        for series in plot.series
        for point in points(series, plot)
        if point is not None
    ]
    if not shown:
        return None
    xs = [value for point in shown for value in (point.x, point.x_low, point.x_high)]
    ys = [value for point in shown for value in (point.y, point.low, point.high)]
    return _span(xs, plots[0].x_log), _span(ys, plots[0].y_log)


def _on_axis(value: float | None, log: bool) -> float | None:
    value = number(value)
    return value if value is not None and math.isfinite(value) and (value > 0 or not log) else None


def _span(values: Iterable[float | None], log: bool) -> Limits:
    present = [value for value in values if value is not None and (value > 0 or not log)]
    low, high = min(present), max(present)
    if log:
        # A single value, or nearly, is given an octave to either side: an axis needs a length.
        factor = (high / low) ** 0.06 if high / low > 1.5 else 2.0
        return low / factor, high * factor
    room = 0.06 * (high - low) if high - low > 1e-9 * max(abs(high), abs(low)) else max(0.5, 0.1 * abs(high))
    return low - room, high + room
