"""Grids of shaded cells: the strength of a hue is the value, so that light and dark pages need no second scale."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hiplora.reporting.canvas import dress
from hiplora.reporting.numbers import finite
from hiplora.reporting.palette import INK, LOOKS, PAPER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

Cells = Mapping[tuple[int, int], float]
BLUE, ORANGE = LOOKS[0].colour, LOOKS[1].colour
_STEPS = 24
_FAINTEST, _STRONGEST = 0.07, 0.95
_DARK_FROM = 0.6  # from here on words on a cell are in the colour of the page
_GAP = 0.05
_KEY_CELLS = 9


@dataclass(frozen=True)
class Scale:
    """How values are shown: the strongest cells are at ±`top`, `text` writes a value.

    `minus` and `plus` are the hues of negative and positive values; `signed` says that the key shows both.
    """

    top: float
    text: Callable[[float], str]
    signed: bool = False
    minus: str = ORANGE
    plus: str = BLUE

    def strength(self, value: float) -> float:
        """Return the opacity of a value's cell, in a few steps; zero is faint, and yet no gap."""
        share = min(1.0, abs(value) / self.top) if self.top > 0 else 0.0
        return _FAINTEST + (_STRONGEST - _FAINTEST) * round(share * _STEPS) / _STEPS


def draw(
    container: "FigureBase",
    cells: Cells,
    columns: Sequence[int],
    rows: Sequence[str],
    xlabel: str,
    scale: Scale,
) -> None:
    """Draw cells at (column, row), rows from top to bottom, with the scale's key below; gaps stay empty."""
    upper, lower = container.subplots(2, 1, gridspec_kw={"height_ratios": [len(rows), 0.55]})
    frame(upper, rows, min(columns), max(columns) + 1)
    for (column, row), value in cells.items():
        cell(upper, column, row, value, scale)
    upper.set_xticks([column + 0.5 for column in _few(columns)], [str(column) for column in _few(columns)])
    upper.set_xlabel(xlabel)
    _key(lower, scale)


def draw_matrix(container: "FigureBase", cells: Cells, names: Sequence[str], scale: Scale) -> None:
    """Draw a square matrix with its numbers; rows carry the names, columns their place in the list."""
    ax = container.subplots()
    places = range(len(names))
    frame(ax, [f"{place + 1}  {names[place]}" for place in places], 0, len(names))
    ax.set_xticks([place + 0.5 for place in places], [str(place + 1) for place in places])
    ax.xaxis.tick_top()
    for (column, row), value in cells.items():
        cell(ax, column, row, value, scale)
        ax.text(column + 0.5, row + 0.5, scale.text(value), ha="center", va="center", fontsize=12,
                color=ink_on(scale.strength(value)))  # fmt: skip


def ink_on(strength: float) -> str:
    """Return the colour of words on a cell of that opacity: the page's ink, or the page itself on a strong cell."""
    return PAPER if strength >= _DARK_FROM else INK


def largest(*grids: Cells) -> float:
    """Return the largest absolute value of several grids, for one scale; 1 where all are zero."""
    return max((abs(value) for cells in grids for value in finite(cells.values())), default=0.0) or 1.0


def _key(ax: "Axes", scale: Scale) -> None:
    frame(ax, [""], 0, _KEY_CELLS)
    start = -scale.top if scale.signed else 0.0
    step = (scale.top - start) / (_KEY_CELLS - 1)
    for index in range(_KEY_CELLS):
        cell(ax, index, 0, start + step * index, scale)
    shown = [0, _KEY_CELLS // 2, _KEY_CELLS - 1] if scale.signed else [0, _KEY_CELLS - 1]
    ax.set_xticks([index + 0.5 for index in shown], [scale.text(start + step * index) for index in shown])


def frame(ax: "Axes", rows: Sequence[str], left: float, right: float) -> None:
    """Set up bare axes for cells: a unit high each, rows named from top to bottom, columns from `left` to `right`."""
    dress(ax)
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_xlim(left, right)
    ax.set_ylim(len(rows), 0)
    ax.set_yticks([row + 0.5 for row in range(len(rows))], rows)
    ax.tick_params(axis="y", labelcolor=INK)


def cell(ax: "Axes", column: float, row: float, value: float, scale: Scale) -> None:
    """Shade the cell whose upper left corner is at (`column`, `row`)."""
    from matplotlib.patches import Rectangle

    place, size = (column + _GAP / 2, row + _GAP / 2), 1 - _GAP
    colour = scale.minus if value < 0 else scale.plus
    ax.add_patch(Rectangle(place, size, size, facecolor=colour, alpha=scale.strength(value), linewidth=0))


def _few(columns: Sequence[int]) -> list[int]:
    """Return at most seven columns to label, at round steps."""
    if len(columns) <= 6:
        return list(columns)
    low, high = min(columns), max(columns)
    step = next(step for step in (2, 5, 10, 20, 25, 50, 100, 10**9) if (high - low) / step <= 6)
    return [column for column in range(low, high + 1) if column % step == 0]
