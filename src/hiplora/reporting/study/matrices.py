"""Matrices as heat maps with their numbers written in."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hiplora.reporting._old_plots import heat
from hiplora.reporting.canvas import Panel
from hiplora.reporting.numbers import number, printable
from hiplora.reporting.palette import MUTED
from hiplora.reporting.study.describe import describe_matrix, wrapped
from hiplora.reporting.study.spec import Matrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

_CHARACTER = 7.4  # CSS pixels of the measuring font
_ROW, _LINE = 34, 16
_WIDEST_CELL, _NARROWEST_CELL = 104, 46
_NAME_SHARE = 0.45  # of the picture's width that the names of rows may take


@dataclass(frozen=True)
class Shades(heat.Scale):
    """From faint at `bottom` to strong at `top`, so that scores of 60 and 70 differ to the eye."""

    bottom: float = 0.0

    def strength(self, value: float) -> float:
        """Return the opacity of a value's cell; of both signs, it is by distance from zero."""
        if self.signed or self.top <= self.bottom:
            return super().strength(value)
        reach = heat.Scale(self.top - self.bottom, self.text)
        return reach.strength(value - self.bottom)


def shades(matrices: Sequence[Matrix]) -> Shades:
    """Return one scale for matrices that are compared: faint is their least number, strong their greatest."""
    values = [
        value
        for matrix in matrices
        for row in matrix.values
        for value in map(number, row)
        if value is not None and math.isfinite(value)
    ]
    decimals = 0 if all(value.is_integer() for value in values) else 1 if max(map(abs, values)) >= 10 else 2
    low, high = min(values, default=0.0), max(values, default=1.0)

    def text(value: float) -> str:
        return f"{round(value, decimals) + 0.0:,.{decimals}f}".replace("-", "−")

    if low < 0:
        return Shades(max(abs(low), abs(high)), text, signed=True)
    return Shades(high, text, bottom=low)


def panel(matrix: Matrix, widest: int, shared: Shades | None = None) -> Panel:
    """Return the picture of a matrix, at most `widest` CSS pixels wide; `shared` is its scale among others."""
    scale = shared or shades([matrix])
    room = int(_NAME_SHARE * widest / _CHARACTER)
    rows = [
        "\n".join(textwrap.wrap(printable(name), room, max_lines=2, placeholder=" …"))
        for name in matrix.row_names
    ]
    left = 24 + _CHARACTER * _longest(rows)
    count = max(1, len(matrix.column_names))
    cell = min(_WIDEST_CELL, max(_NARROWEST_CELL, (widest - left) / count))
    columns = [
        "\n".join(textwrap.wrap(printable(name), max(5, int(cell / _CHARACTER)), break_long_words=False))
        or " "
        for name in matrix.column_names
    ]
    # A heading that no break makes narrow enough is wider than its cell: the picture grows.
    cell = max(cell, _CHARACTER * _longest(columns) + 4)
    width = int(max(220, left + cell * count))
    title = wrapped(f"{matrix.title} ({matrix.unit})" if matrix.unit else matrix.title, width)
    lines = max((name.count("\n") + 1 for name in columns), default=1)
    height = 34 + 18 * (title.count("\n") + 1) + _LINE * lines + _ROW * max(1, len(rows))

    def draw(container: "FigureBase") -> None:
        ax = container.subplots()
        heat.frame(ax, rows or [""], 0, count)
        ax.xaxis.tick_top()
        ax.set_xticks([place + 0.5 for place in range(len(columns))], columns)
        _fill(ax, matrix, scale)

    return Panel(matrix.name, title, describe_matrix(matrix), draw, width, height)


def _longest(names: Sequence[str]) -> int:
    """The characters of the longest line."""
    return max((len(line) for name in names for line in name.split("\n")), default=0)


def _fill(ax: "Axes", matrix: Matrix, scale: Shades) -> None:
    empty = True
    for row, values in enumerate(matrix.values):
        for column, value in enumerate(map(number, values)):
            if value is None:
                continue
            empty = False
            shown = value if math.isfinite(value) else math.copysign(scale.top, value)
            heat.cell(ax, column, row, shown, scale)
            text = scale.text(value) if math.isfinite(value) else "∞" if value > 0 else "−∞"
            ax.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=12,
                    color=heat.ink_on(scale.strength(shown)))  # fmt: skip
    if empty:
        ax.text(
            0.5, 0.5, "nothing measured yet", transform=ax.transAxes, color=MUTED, ha="center", va="center"
        )
