"""The legend of a plate that is saved as a file: keys side by side, in as many rows as the width asks for."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hiplora.reporting.palette import PAPER, Look

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

_FONT = 12.5
_PER_CHARACTER, _KEY = 7.0, 56  # CSS pixels, of the measuring font


def height(legend: Mapping[str, Look], width: float) -> int:
    """Return the height in CSS pixels that the legend needs at a width; 0 where there is none."""
    if not legend:
        return 0
    return 8 + 22 * math.ceil(len(legend) / _columns(legend, width))


def draw(container: "FigureBase", legend: Mapping[str, Look], width: float) -> None:
    """Draw the legend into a figure or subfigure of that width."""
    container.legend(
        handles=[_handle(name, look) for name, look in legend.items()],
        loc="center left",
        ncols=_columns(legend, width),
        fontsize=_FONT,
    )


def _columns(legend: Mapping[str, Look], width: float) -> int:
    widest = max(_KEY + _PER_CHARACTER * len(name) for name in legend)
    return max(1, min(len(legend), int(width // widest)))


def _handle(name: str, look: Look) -> Any:
    from matplotlib.lines import Line2D

    return Line2D(
        [],
        [],
        color=look.colour,
        marker=look.marker,
        markersize=5,
        markerfacecolor=PAPER if look.hollow else look.colour,
        label=name,
        dashes=(look.dashes or (None, None)),
    )
