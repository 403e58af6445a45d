"""Horizontal bars with the method's name at the left and the value at the right: no legend to look up."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hiplora.reporting.canvas import dress
from hiplora.reporting.numbers import finite, shorten
from hiplora.reporting.palette import INK, MUTED, PAPER, Look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

BAR, GAP, LABEL, CHROME = 26, 9, 23, 98
_LEFT_CHARS, _ROW_CHARS = 20, 56
# Behind text: keeps grid lines and reference lines from crossing it.
_GROUND = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.85, "pad": 1.5}


@dataclass(frozen=True)
class Bar:
    """One bar: whose, how long, what is written at its end; an optional outline and an optional mark.

    `outline` is an earlier or reference value drawn as an open bar behind; `dots` are single values; `label`
    stands at the left instead of the method's name.
    """

    method: str
    value: float | None
    text: str
    outline: float | None = None
    dots: tuple[float, ...] = ()
    label: str = ""


@dataclass(frozen=True)
class Group:
    """Bars that share a label, and an optional reference value drawn as an upright line through them."""

    label: str
    bars: Sequence[Bar]
    reference: float | None = None


def words(groups: Sequence[Group]) -> str:
    """Return the bars in words, for readers who cannot see them."""
    parts = []
    for group in groups:
        text = ", ".join(f"{bar.label or bar.method} {bar.text}" for bar in group.bars)
        parts.append(f"{group.label}: {text}" if group.label else text)
    return "; ".join(parts) + "."


def height(groups: Sequence[Group]) -> int:
    """Return the height in pixels that the groups need."""
    return CHROME + sum(BAR * len(group.bars) + GAP + (LABEL if group.label else 0) for group in groups)


def draw(
    container: "FigureBase",
    groups: Sequence[Group],
    looks: Mapping[str, Look],
    xlabel: str,
    *,
    start: float = 0.0,
    limit: float | None = None,
    ticks: Callable[[float], str] | None = None,
) -> None:
    """Draw grouped bars from `start`, in the order given, top to bottom.

    `limit` is the largest possible value (1 for a share); without it the axis ends behind the longest bar.
    """
    ax = container.subplots()
    dress(ax, grid="x")
    ax.set_xlabel(xlabel, loc="left")
    low, high = _range(groups, start, limit)
    # The values stand outside the axes where bars are long: the layout makes room for them.
    ax.set_xlim(low, high)
    y, places = 0.0, []
    names = [shorten(bar.label or bar.method, _LEFT_CHARS) for group in groups for bar in group.bars]
    room = _ROW_CHARS - max(map(len, names), default=0)
    for group in groups:
        if group.label:
            ax.text(0, y + LABEL / 2 + 1, shorten(group.label, room), transform=ax.get_yaxis_transform(),
                    va="center", ha="left", fontsize=12.5, color=INK, bbox=_GROUND)  # fmt: skip
            y += LABEL
        top = y
        for bar in group.bars:
            _bar(ax, bar, y + BAR / 2, looks[bar.method], start, high)
            places.append(y + BAR / 2)
            y += BAR
        ax.plot([start, start], [top, y], color=MUTED, linewidth=1.2, zorder=2.5, solid_capstyle="butt")
        _reference(ax, group, top, y)
        y += GAP
    ax.set_ylim(y, 0)
    ax.set_yticks(places, names)
    ax.tick_params(axis="y", labelcolor=INK)
    ax.spines["left"].set_visible(False)
    ax.spines["bottom"].set_bounds(low, high)
    _ticks(ax, low, high, ticks)


def _range(groups: Sequence[Group], start: float, limit: float | None) -> tuple[float, float]:
    values = finite(
        value
        for group in groups
        for value in (
            group.reference,
            *(v for bar in group.bars for v in (bar.value, bar.outline, *bar.dots)),
        )
    )
    low = min([start, *values])
    high = limit if limit is not None else max([start, *values])
    if high <= low:
        high = low + (abs(low) or 1.0)
    if low < start:
        low -= 0.04 * (high - low)
    return low, high


def _bar(ax: "Axes", bar: Bar, y: float, look: Look, start: float, high: float) -> None:
    end = start
    if bar.outline is not None and math.isfinite(bar.outline):
        ax.barh(
            y,
            bar.outline - start,
            left=start,
            height=BAR - 9,
            fill=False,
            edgecolor=look.colour,
            linewidth=1.2,
        )
        end = max(end, bar.outline)
    if bar.value is not None:
        value = min(bar.value, high)
        ax.barh(y, value - start, left=start, height=BAR - 9, color=look.colour, linewidth=0)
        end = max(end, value)
    for dot in finite(bar.dots):
        ax.plot(
            [dot],
            [y],
            marker="o",
            markersize=5.5,
            markerfacecolor=PAPER,
            markeredgecolor=look.colour,
            zorder=4,
            clip_on=False,
        )
        end = max(end, dot)
    missing = bar.value is None
    ax.annotate(bar.text, (end, y), xytext=(11 if bar.dots else 6, 0), textcoords="offset points", va="center",
                ha="left", fontsize=12, color=MUTED if missing else INK, fontstyle="italic" if missing else "normal",
                annotation_clip=False, zorder=5, bbox=_GROUND)  # fmt: skip


def _reference(ax: "Axes", group: Group, top: float, bottom: float) -> None:
    if group.reference is None or not math.isfinite(group.reference):
        return
    ax.plot(
        [group.reference] * 2,
        [top + 1, bottom - 1],
        color=INK,
        linewidth=1.6,
        zorder=3,
        solid_capstyle="butt",
    )


def _ticks(ax: "Axes", low: float, high: float, text: Callable[[float], str] | None) -> None:
    from matplotlib.ticker import MaxNLocator

    places = [
        tick
        for tick in MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        if low <= tick <= high * 1.0001
    ]
    step = places[1] - places[0] if len(places) > 1 else 1.0
    decimals = max(0, -math.floor(math.log10(step) + 1e-9) + (1 if f"{step:e}".startswith("2.5") else 0))
    ax.set_xticks(places, [text(tick) if text else f"{tick:.{decimals}f}" for tick in places])
