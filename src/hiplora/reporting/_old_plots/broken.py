"""What a merge broke: the change of every task's score, and how many merges fail, with their intervals."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from hiplora.reporting.canvas import Panel, Plate, dress
from hiplora.reporting.merge_results import Evaluation, Interval
from hiplora.reporting.numbers import MINUS, finite, percent, shorten, signed
from hiplora.reporting.palette import INK, LOOKS, MUTED, PAPER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

_ROW, _CHROME = 30, 105
_NAME_CHARS = 20


def plate(evaluation: Evaluation) -> Plate | None:
    """Return the plate of what the merge broke, or None where nothing of it can be drawn."""
    changes = {task.name: task.difference for task in evaluation.tasks}
    fails = {f"τ = {tau}": found for tau, found in evaluation.merge_fail.items()}
    panels = [
        _panel("broken-tasks", "Change of the score", changes, points, "points, after − before", None),
        _panel("broken-fail", "MergeFail", fails, percent, "share of the merges that fail", 1.0),
    ]
    shown = [panel for panel in panels if panel is not None]
    if not shown:
        return None
    return Plate(
        name="broken",
        heading="What the merge broke",
        caption="Before: each task with its own adapter alone. After: with the merge. Bars show confidence intervals; "
        "a filled mark: zero lies outside, the change is clear."
        + (
            " MergeFail: the share of the merges in which a task falls below τ times its score before."
            if fails
            else ""
        ),
        panels=shown,
    )


def points(value: float | None) -> str:
    """Format a difference of percentages: +1.2, −3.4, ±0.0."""
    return signed(value, 1)


def _panel(
    name: str,
    title: str,
    rows: Mapping[str, Interval],
    text: Callable[[float | None], str],
    xlabel: str,
    limit: float | None,
) -> Panel | None:
    if not finite(row.estimate for row in rows.values()):
        return None

    def draw(container: "FigureBase") -> None:
        ax = container.subplots()
        dress(ax, grid="x")
        ax.set_xlabel(xlabel, loc="left")
        for place, row in enumerate(rows.values()):
            _mark(ax, row, place, text)
        _frame(ax, [shorten(name, _NAME_CHARS) for name in rows], list(rows.values()), text, limit)

    words = ", ".join(f"{label} {_words(row, text)}" for label, row in rows.items())
    return Panel(name, title, f"{words}.", draw, 460, _CHROME + _ROW * len(rows))


def _words(row: Interval, text: Callable[[float | None], str]) -> str:
    known = row.low is not None and row.high is not None
    return f"{text(row.estimate)} ({text(row.low)} to {text(row.high)})" if known else text(row.estimate)


def _mark(ax: "Axes", row: Interval, place: int, text: Callable[[float | None], str]) -> None:
    colour = LOOKS[0].colour
    ends = finite((row.low, row.high))
    if len(ends) == 2:
        ax.plot(ends, [place, place], color=colour, linewidth=2.2, solid_capstyle="round")
    if row.estimate is None or not math.isfinite(row.estimate):
        ax.annotate("not measured", (0, place), xytext=(6, 0), textcoords="offset points", va="center",
                    fontsize=12, color=MUTED, fontstyle="italic", annotation_clip=False)  # fmt: skip
        return
    ax.plot([row.estimate], [place], "o", markersize=8, markeredgecolor=colour, markeredgewidth=1.8,
            markerfacecolor=colour if row.excludes_zero else PAPER, zorder=3, clip_on=False)  # fmt: skip
    ax.annotate(text(row.estimate), (1, place), xycoords=ax.get_yaxis_transform(), xytext=(8, 0),
                textcoords="offset points", va="center", ha="left", fontsize=12, color=INK,
                annotation_clip=False)  # fmt: skip


def _frame(
    ax: "Axes",
    names: Sequence[str],
    rows: Sequence[Interval],
    text: Callable[[float | None], str],
    limit: float | None,
) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    values = finite(value for row in rows for value in (row.estimate, row.low, row.high))
    low, high = min(0.0, *values), max(0.0, *values)
    room = 0.06 * (high - low) or 1.0
    ax.set_xlim(low - room, limit or high + room)
    ax.axvline(0, color=MUTED, linewidth=1.3, zorder=1.5)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(axis="y", labelcolor=INK)
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: text(value) if limit else f"{value:g}".replace("-", MINUS))
    )
