"""Gain changes against singular values: which of the base model's strong directions an update bends.

For HiP-LoRA the change of gain i is the trained δ_i; for any other update ΔW it is u_iᵀ ΔW v_i, the same
quantity measured from outside.
"""

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from hiplora.reporting.canvas import Panel, Plate, dress
from hiplora.reporting.numbers import median, percent, power_of_ten, shorten
from hiplora.reporting.palette import INK, MUTED, PAPER, Look, is_hiplora

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import FigureBase

ModuleUpdate = Any
Point = tuple[float, float]
TYPE_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj")
# Beyond this the points of one panel are thinned evenly along the spectrum, to keep the page small.
_MOST_POINTS = 1500
_FLOOR = 1e-7
_MOST_TYPES = 8


class Typed(Protocol):
    """A row of a module, whose type is the last part of the module's name."""

    @property
    def type(self) -> str:
        """The module's type, such as q_proj."""


def plate(updates: Mapping[str, Sequence[ModuleUpdate]], looks: Mapping[str, Look]) -> Plate | None:
    """Return one panel per module type, the methods side by side on equal axes, or None without gains."""
    types = types_of(row for rows in updates.values() for row in rows if row.gains)
    panels = [panel for kind in types[:_MOST_TYPES] if (panel := _panel(kind, updates, looks)) is not None]
    if not panels:
        return None
    notes = ["At most the lowest per cent of the dots lies below the axis, unless a panel says otherwise."]
    if any(len(gain_points(rows, kind)) > _MOST_POINTS for rows in updates.values() for kind in types):
        notes.append(f"Of more than {_MOST_POINTS:,} dots, {_MOST_POINTS:,} are drawn; the line is of all.")
    if len(types) > _MOST_TYPES:
        notes.append(f"Not shown: {', '.join(types[_MOST_TYPES:])}.")
    return Plate(
        name="spectrum",
        heading="How hard the update pulls on each strong direction",
        caption="Each dot is one protected direction of one module: the size of the change of its gain, |δ|, against "
        "its singular value σ in the base weight. For updates other than HiP-LoRA the change is |uᵀ ΔW v|, the same "
        "quantity measured from outside. Line: median. Dotted: a change of 1 % and 10 % of σ. "
        + " ".join(notes),
        panels=panels,
    )


def types_of(rows: Iterable[Typed]) -> list[str]:
    """Return the module types of the rows: the usual projections in their usual order, then the others."""
    found = {row.type for row in rows}
    return [kind for kind in TYPE_ORDER if kind in found] + sorted(found - set(TYPE_ORDER))


def gain_points(rows: Sequence[ModuleUpdate], kind: str) -> list[Point]:
    """Return (σ, |gain|) of every direction of the modules of one type for which both are finite and σ > 0."""
    return [
        (sigma, abs(gain))
        for row in rows
        if row.type == kind
        for sigma, gain in zip(row.sigma, row.gains, strict=False)
        if sigma is not None
        and gain is not None
        and sigma > 0
        and math.isfinite(sigma)
        and math.isfinite(gain)
    ]


def relative_gains(rows: Sequence[ModuleUpdate], kind: str) -> list[float]:
    """Return |gain|/σ of every direction of the modules of one type."""
    return [gain / sigma for sigma, gain in gain_points(rows, kind)]


def _panel(
    kind: str, updates: Mapping[str, Sequence[ModuleUpdate]], looks: Mapping[str, Look]
) -> Panel | None:
    clouds = {name: points for name, rows in updates.items() if (points := gain_points(rows, kind))}
    nonzero = [gain for points in clouds.values() for _, gain in points if gain > 0]
    if not clouds:
        return None
    columns = min(2, len(clouds))
    rows = math.ceil(len(clouds) / columns)
    limits = _limits([sigma for points in clouds.values() for sigma, _ in points], nonzero)

    def draw(container: "FigureBase") -> None:
        grid = container.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for index, ax in enumerate(grid.flat):
            if index < len(clouds):
                name = list(clouds)[index]
                _facet(ax, name, clouds[name], looks[name], limits)
            else:
                ax.set_visible(False)
                grid.flat[index - columns].tick_params(labelbottom=True)
        container.supxlabel("singular value σ of the base weight", fontsize=12.5, color=MUTED)
        container.supylabel(_ylabel(clouds), fontsize=12.5, color=MUTED)

    words = "; ".join(
        f"{name} {percent(median([g / s for s, g in points]))}" for name, points in clouds.items()
    )
    return Panel(
        name=f"spectrum-{kind}",
        title=shorten(kind, 46),
        description=f"Median gain change relative to σ in {kind}: {words}.",
        draw=draw,
        width=470 if columns > 1 else 460,
        height=70 + 218 * rows,
    )


def _ylabel(clouds: Mapping[str, object]) -> str:
    ours = [is_hiplora(name) for name in clouds]
    return "|δ|" if all(ours) else "|δ| or |uᵀ ΔW v|" if any(ours) else "|uᵀ ΔW v|"


def _limits(sigmas: Sequence[float], gains: Sequence[float]) -> tuple[Point, Point]:
    """Axis limits for both facets; gains far below the largest (rounding noise, exact zeros) fall off the axis."""
    top = max(gains, default=1.0)
    bottom = min((gain for gain in gains if gain >= _FLOOR * top), default=top / 10)
    # The lowest per cent of a cloud reaches far down on a log axis (signs change through zero): cut it.
    ordered = sorted(gain for gain in gains if gain >= bottom)
    bottom = ordered[len(ordered) // 100] if ordered else bottom
    right = max(sigmas) * 1.15
    # Where the guide of one per cent is near, let it end at the right edge, which is where its label stands.
    guide = 0.012 * right if 0.01 * right < 10 * top else 0.0
    return (min(sigmas) / 1.15, right), (bottom / 1.4, max(top * 1.6, bottom * 3, guide))


def _facet(ax: "Axes", name: str, points: Sequence[Point], look: Look, limits: tuple[Point, Point]) -> None:
    dress(ax, grid="both")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(limits[0])
    ax.set_ylim(limits[1])
    ax.set_title(shorten(name, 24), loc="left", color=INK)
    _guides(ax, limits)
    shown = [point for point in points if point[1] >= limits[1][0]]
    _dots(ax, thin(shown), look)
    _median_line(ax, shown, look)
    if not any(gain > 0 for _, gain in points):
        ax.text(0.5, 0.5, "all at zero", transform=ax.transAxes, color=MUTED, ha="center", va="center")
    elif (hidden := len(points) - len(shown)) > 0.05 * len(points):
        ax.set_title(f"{percent(hidden / len(points))} below axis", loc="right", color=MUTED, fontsize=11)
    for axis in (ax.xaxis, ax.yaxis):
        log_ticks(axis)


def _dots(ax: "Axes", points: Sequence[Point], look: Look) -> None:
    """Draw dots as very short round strokes: a tenth of the size of one SVG element per dot."""
    few = len(points) < 200
    # Not quite zero length, and unsnapped: the raster backend draws no strokes of zero length.
    xs = [value for sigma, _ in points for value in (sigma, sigma * 1.001, math.nan)]
    ys = [value for _, gain in points for value in (gain, gain, math.nan)]
    for start in range(0, len(xs), 90):
        # Several paths, so that dots on top of each other add up to a darker spot.
        ax.plot(xs[start : start + 90], ys[start : start + 90], color=look.colour,
                alpha=0.75 if few else 0.35, linewidth=4.5 if few else 3.2, solid_capstyle="round",
                snap=False)  # fmt: skip


def _median_line(ax: "Axes", points: Sequence[Point], look: Look) -> None:
    if len(points) < 24:
        return
    ordered = sorted(points)
    bins = min(12, len(ordered) // 8)
    edges = [len(ordered) * index // bins for index in range(bins + 1)]
    chunks = [ordered[low:high] for low, high in itertools.pairwise(edges)]
    xs = [statistics.median(sigma for sigma, _ in chunk) for chunk in chunks]
    ys = [statistics.median(gain for _, gain in chunk) for chunk in chunks]
    ax.plot(xs, ys, color=PAPER, linewidth=4.5, alpha=0.7, zorder=3)
    ax.plot(xs, ys, color=look.colour, linewidth=2.4, zorder=3.1)


def _guides(ax: "Axes", limits: tuple[Point, Point]) -> None:
    (left, right), (bottom, top) = limits
    for share, text in ((0.01, "1 %"), (0.1, "10 %")):
        ax.plot(
            [left, right], [share * left, share * right], color=MUTED, linewidth=1.1, linestyle=(0, (1, 2))
        )
        if bottom * 1.15 < share * right < top / 1.05:
            ax.annotate(text, (right, share * right), xytext=(3, 0), textcoords="offset points", fontsize=11,
                        color=MUTED, va="center", ha="left", annotation_clip=False)  # fmt: skip


def log_ticks(axis: "Axis") -> None:
    """Label a logarithmic axis at a few round numbers of its present limits, in plain figures."""
    from matplotlib.ticker import NullLocator

    low, high = axis.get_view_interval()
    places = log_places(low, high)
    axis.set_ticks(places, labels=[_log_label(place) for place in places])
    axis.set_minor_locator(NullLocator())


def log_places(low: float, high: float) -> list[float]:
    """Return two to five round numbers for a logarithmic axis, however many or few decades it spans."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    best: list[float] = []
    for leads in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0)):
        found = [
            lead * 10.0**decade for decade in decades for lead in leads if low <= lead * 10.0**decade <= high
        ]
        if len(best) < len(found) <= 5:
            best = found
    if len(best) >= 2:
        return best
    powers = [10.0**decade for decade in decades if low <= 10.0**decade <= high]
    if len(powers) > 5:
        return powers[:: math.ceil(len(powers) / 5)]
    # Less than an octave: linear steps.
    step = 10.0 ** math.floor(math.log10(high - low))
    step *= next(factor for factor in (0.2, 0.5, 1, 2, 5) if (high - low) / (step * factor) <= 4.5)
    return [step * index for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_label(value: float) -> str:
    if 0.00099 < value < 9999:
        return f"{value:.6g}"
    exponent = math.floor(math.log10(value) + 1e-9)
    lead = round(value / 10**exponent)
    return power_of_ten(exponent) if lead == 1 else f"{lead}·{power_of_ten(exponent)}"


def thin(points: Sequence[Point]) -> Sequence[Point]:
    """Keep at most `_MOST_POINTS`, evenly along the spectrum."""
    if len(points) <= _MOST_POINTS:
        return points
    ordered = sorted(points)
    return [ordered[index * len(ordered) // _MOST_POINTS] for index in range(_MOST_POINTS)]
