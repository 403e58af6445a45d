"""Words beside points, placed so that they cover neither each other nor the lines."""

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Box = tuple[float, float, float, float]  # left, bottom, right, top in pixels of the drawing
_FONT = 11.0
_WIDTH, _HEIGHT = 0.62 * _FONT, 1.25 * _FONT  # of a character of the measuring font, in pixels
_AROUND_POINT = 5.0
_STEP = 6.0  # between the places along a line that a label keeps clear of
# Where a label may stand, from its point: sides first, corners next, then further out.
_SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
_GAPS = (7.0, 13.0)


def write(
    ax: "Axes",
    wanted: Sequence[tuple[float, float, str, str]],
    lines: Iterable[Sequence[tuple[float, float]]],
) -> int:
    """Write labels (x, y, text, colour) near their points where there is room; return how many found none.

    `lines` are the points of everything drawn, line by line. The axes must have their limits.
    """
    if (figure := ax.get_figure(root=True)) is not None:
        figure.draw_without_rendering()  # lays the figure out: positions are known after it
    frame = ax.get_window_extent()
    lines = [[tuple(ax.transData.transform(point)) for point in line] for line in lines]
    taken = [_box(x, y, _AROUND_POINT, _AROUND_POINT) for line in lines for x, y in _along(line)]
    left_out = 0
    for x, y, text, colour in wanted:
        here = ax.transData.transform((x, y))
        for dx, dy in _places(len(text)):
            box = _box(here[0] + dx, here[1] + dy, len(text) * _WIDTH, _HEIGHT)
            inside = box[0] >= frame.x0 and box[2] <= frame.x1 and box[1] >= frame.y0 and box[3] <= frame.y1
            if inside and not any(_meet(box, other) for other in taken):
                ax.annotate(text, (x, y), xytext=(dx, dy), textcoords="offset pixels", ha="center", va="center",
                            fontsize=_FONT, color=colour, zorder=6)  # fmt: skip
                taken.append(box)
                break
        else:
            left_out += 1
    return left_out


def _places(characters: int) -> list[tuple[float, float]]:
    half_width, half_height = characters * _WIDTH / 2, _HEIGHT / 2
    return [(sx * (gap + half_width), sy * (gap + half_height)) for gap in _GAPS for sx, sy in _SIDES]


def _along(line: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the places on a polygon, not further apart than `_STEP`."""
    found = list(line[:1])
    for (x, y), (to_x, to_y) in itertools.pairwise(line):
        parts = max(1, int(max(abs(to_x - x), abs(to_y - y)) // _STEP))
        found += [
            (x + (to_x - x) * part / parts, y + (to_y - y) * part / parts) for part in range(1, parts + 1)
        ]
    return found


def _box(x: float, y: float, width: float, height: float) -> Box:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
