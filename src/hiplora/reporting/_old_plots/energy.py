"""Where an update's energy lies: the share inside the protected subspace, per layer and per module type."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hiplora.reporting._old_plots import bars
from hiplora.reporting._old_plots.spectrum import relative_gains, types_of
from hiplora.reporting.canvas import Panel, Plate, axes
from hiplora.reporting.numbers import finite, mean, median, percent, significant
from hiplora.reporting.palette import Look, is_hiplora, plain
from hiplora.reporting.results import ModuleUpdate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

SIDES = {
    "left": "Output side",
    "right": "Input side",
    "both": "Both sides at once",
}
_HIPLORA_NOTE = " HiP-LoRA enters these directions only through its gains δ, so its three curves agree."
_OTHER_BASIS_NOTE = (
    " With the activation basis it protects other directions, which this figure does not show."
)


@dataclass(frozen=True)
class TypeRow:
    """One module type of one method: how many modules, ‖ΔW‖_F over all of them, shares, median |gain|/σ."""

    type: str
    method: str
    modules: int
    norm: float | None
    left: float | None
    right: float | None
    both: float | None
    gain: float | None


def plate(updates: Mapping[str, Sequence[ModuleUpdate]], looks: Mapping[str, Look]) -> Plate | None:
    """Return the per-layer plate, one panel a side, or None where no module of a layer was measured."""
    shares = [
        v
        for rows in updates.values()
        for row in rows
        for side in SIDES
        if (v := getattr(row, side)) is not None
    ]
    top = max(finite(shares), default=0.0)
    panels = [panel for side in SIDES if (panel := _layer_panel(side, updates, looks, top)) is not None]
    if not panels:
        return None
    return Plate(
        name="energy",
        heading="How much of the update lies in the protected directions",
        caption="Share of the update's energy ‖ΔW‖² that is written into the base weight's leading output directions "
        "(output side), read from its leading input directions (input side), or both at once. Lines: all modules of "
        "a layer, weighted by their energy. Small marks: single modules."
        + (_HIPLORA_NOTE if any(plain(name) == "hiplora" for name in updates) else "")
        + (_OTHER_BASIS_NOTE if any(is_hiplora(n) and plain(n) != "hiplora" for n in updates) else ""),
        panels=panels,
        legend={name: looks[name] for name, rows in updates.items() if rows},
    )


def types_plate(updates: Mapping[str, Sequence[ModuleUpdate]], looks: Mapping[str, Look]) -> Plate | None:
    """Return the breakdown by module type: size of the update, and its share inside, or None."""
    rows = type_rows(updates)
    norms = _type_panel(
        "types-norm", "Size of the update", rows, "norm", "Frobenius norm ‖ΔW‖, all layers", looks
    )
    shares = _type_panel(
        "types-share",
        "Share that touches the protected directions",
        rows,
        "touched",
        "share of the energy, either side",
        looks,
    )
    panels = [panel for panel in (norms, shares) if panel is not None]
    if not panels:
        return None
    return Plate(
        name="types",
        heading="By module type",
        caption="Left: the norm of the update over all layers together. Right: the share of its energy that reads from "
        "or writes into the protected directions.",
        panels=panels,
        legend={name: looks[name] for name, found in updates.items() if found},
    )


def share(rows: Sequence[ModuleUpdate], side: str) -> float | None:
    """Return the share of the rows' total energy on one side (`touched`: left or right), energy-weighted.

    Rows without a norm count equally, where none has one; a zero update has no share.
    """
    pairs = [
        (value, row.norm) for row in rows if (value := _side(row, side)) is not None and math.isfinite(value)
    ]
    weighted = [(value, norm * norm) for value, norm in pairs if norm is not None and math.isfinite(norm)]
    if not weighted:
        return mean(value for value, _ in pairs)
    total = sum(weight for _, weight in weighted)
    return sum(value * weight for value, weight in weighted) / total if total > 0 else None


def norm(rows: Sequence[ModuleUpdate]) -> float | None:
    """Return ‖ΔW‖_F of all rows together, or None where none has a norm."""
    norms = finite(row.norm for row in rows)
    return math.sqrt(sum(value * value for value in norms)) if norms else None


def type_rows(updates: Mapping[str, Sequence[ModuleUpdate]]) -> list[TypeRow]:
    """Return the breakdown by module type, a row for each type and method."""
    result = []
    for kind in types_of(row for rows in updates.values() for row in rows):
        for name, rows in updates.items():
            if own := [row for row in rows if row.type == kind]:
                gain = median(relative_gains(own, kind))
                shares = {side: share(own, side) for side in ("left", "right", "both")}
                result.append(TypeRow(kind, name, len(own), norm(own), **shares, gain=gain))
    return result


def _side(row: ModuleUpdate | TypeRow, side: str) -> float | None:
    if side != "touched":
        return getattr(row, side)
    if row.left is None or row.right is None or row.both is None:
        return None
    return row.left + row.right - row.both


def _layer_panel(
    side: str, updates: Mapping[str, Sequence[ModuleUpdate]], looks: Mapping[str, Look], top: float
) -> Panel | None:
    lines = {name: line for name, rows in updates.items() if (line := _by_layer(rows, side))}
    if not lines:
        return None

    def draw(container: "FigureBase") -> None:
        ax = axes(container, "layer", "share of the energy")
        for name, line in lines.items():
            look = looks[name]
            singles = [
                (r.layer, v)
                for r in updates[name]
                if r.layer is not None and (v := getattr(r, side)) is not None
            ]
            ax.plot(*zip(*singles, strict=True), linestyle="none", marker=look.marker, markersize=3, alpha=0.35,
                    color=look.colour, markeredgewidth=0)  # fmt: skip
            ax.plot(list(line), list(line.values()), color=look.colour, dashes=look.dashes or (None, None),
                    marker=look.marker if len(line) < 15 else "", markersize=5)  # fmt: skip
        _layer_axes(ax, top, sorted({layer for line in lines.values() for layer in line}))

    words = "; ".join(f"{name} {percent(share(updates[name], side))} over all layers" for name in lines)
    return Panel(f"energy-{side}", SIDES[side], f"{words}.", draw, 330, 290)


def _by_layer(rows: Sequence[ModuleUpdate], side: str) -> dict[int, float]:
    layers = sorted({row.layer for row in rows if row.layer is not None})
    shares = {layer: share([row for row in rows if row.layer == layer], side) for layer in layers}
    return {layer: value for layer, value in shares.items() if value is not None}


def _layer_axes(ax: "Axes", top: float, layers: Sequence[int]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ax.set_ylim(0, min(1.03, max(top * 1.08, 1e-6)))
    if len(layers) <= 6:
        ax.set_xticks(layers)
    else:
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(round(value, 9))))
    low, high = ax.get_xlim()
    if high - low < 2:
        ax.set_xlim((low + high) / 2 - 1, (low + high) / 2 + 1)


def _type_panel(
    name: str, title: str, rows: Sequence[TypeRow], value: str, xlabel: str, looks: Mapping[str, Look]
) -> Panel | None:
    if len({row.method for row in rows}) == 1:
        groups = [bars.Group("", [replace(_type_bar(row, value), label=row.type) for row in rows])]
    else:
        kinds = dict.fromkeys(row.type for row in rows)
        groups = [bars.Group(k, [_type_bar(row, value) for row in rows if row.type == k]) for k in kinds]
    if not finite(bar.value for group in groups for bar in group.bars):
        return None

    def draw(container: "FigureBase") -> None:
        bars.draw(container, groups, looks, xlabel, ticks=percent if value == "touched" else None)

    return Panel(name, title, bars.words(groups), draw, 460, bars.height(groups))


def _type_bar(row: TypeRow, value: str) -> bars.Bar:
    if value == "norm":
        return bars.Bar(row.method, row.norm, significant(row.norm))
    touched = _side(row, "touched")
    return bars.Bar(row.method, touched, percent(touched))
