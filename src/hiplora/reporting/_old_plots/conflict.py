"""Where adapters that are merged meet: by layer and module type, pair by pair, and what cancels."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from hiplora.reporting._old_plots import heat
from hiplora.reporting._old_plots.spectrum import types_of
from hiplora.reporting.canvas import Panel, Plate
from hiplora.reporting.merge_results import MergeReport, Module
from hiplora.reporting.numbers import hundredths, mean, percent, shorten, signed

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

Value = Callable[[Module], float | None]
_ROW, _CHROME, _MATRIX_ROW, _MATRIX_CHROME = 24, 120, 38, 80
_NARROW, _WIDE = 330, 460
_NAME_CHARS, _TYPE_CHARS = 16, 14
_MOST_IN_MATRIX, _MOST_IN_NARROW = 8, 4


def where_plate(report: MergeReport) -> Plate | None:
    """Return the plate of overlaps and scores by layer and module type, or None where no layer has two adapters."""
    left, right = (_grid(report, lambda row: row.left), _grid(report, lambda row: row.right))
    score = _grid(report, lambda row: row.score)
    overlap, scores = (
        heat.Scale(heat.largest(left, right), percent),
        heat.Scale(heat.largest(score), hundredths),
    )
    panels = [
        _grid_panel("where-left", "Overlap of the outputs", report, left, overlap, _NARROW),
        _grid_panel("where-right", "Overlap of the inputs", report, right, overlap, _NARROW),
        _grid_panel("where-score", "Conflict score", report, score, scores, _NARROW),
    ]
    shown = [panel for panel in panels if panel is not None]
    if not shown:
        return None
    return Plate(
        name="where",
        heading="Where the adapters meet",
        caption="Overlap: what share of the directions that they write (outputs) or read (inputs) two adapters have in "
        "common, the mean over all pairs. Conflict score: overlap, less where the updates agree; of the pair that "
        "conflicts most." + _gains_note(report) + _outside(report),
        panels=shown,
    )


def pairs_plate(report: MergeReport) -> Plate | None:
    """Return the matrices of the pairs' mean overlaps and cosines, or None for two adapters or very many."""
    if not 3 <= len(report.adapters) <= _MOST_IN_MATRIX:
        return None
    scales = {
        "left": ("Overlap of the outputs", heat.Scale(1.0, percent)),
        "right": ("Overlap of the inputs", heat.Scale(1.0, percent)),
        "cosine": ("Cosine", heat.Scale(1.0, hundredths)),
    }
    panels = [_matrix_panel(name, title, report, scale) for name, (title, scale) in scales.items()]
    shown = [panel for panel in panels if panel is not None]
    if not shown:
        return None
    return Plate(
        name="pairs",
        heading="Pair by pair",
        caption="Means over the modules that both adapters change. Cosine: 1 where two updates agree, −1 (orange) "
        "where one takes back what the other does, 0 where they are unrelated.",
        panels=shown,
    )


def cancels_plate(report: MergeReport) -> Plate | None:
    """Return norm ratio and sign conflict, against unrelated updates, by layer and module type; or None of nothing."""
    ratios, signs = _grid(report, _ratio_excess), _grid(report, _sign_excess)
    ratio_scale = heat.Scale(heat.largest(ratios), signed, signed=True)
    sign_scale = heat.Scale(heat.largest(signs), signed, signed=True, minus=heat.BLUE, plus=heat.ORANGE)
    panels = [
        _grid_panel("cancels-norm", "Norm ratio, less the unrelated", report, ratios, ratio_scale, _WIDE),
        _grid_panel("cancels-signs", "Sign conflict, less the unrelated", report, signs, sign_scale, _WIDE),
    ]
    shown = [panel for panel in panels if panel is not None]
    if not shown:
        return None
    return Plate(
        name="cancels",
        heading="What cancels",
        caption="Norm ratio: the norm of the sum over the sum of the norms. Sign conflict: the share of the magnitude "
        "that meets its like of the other sign. Both against what unrelated updates of the same sizes would give: blue "
        "where the adapters agree more than that, orange where more cancels." + _outside(report),
        panels=shown,
    )


def _ratio_excess(row: Module) -> float | None:
    if len(row.adapters) < 2 or row.norm_ratio is None or row.unrelated is None:
        return None
    return row.norm_ratio - row.unrelated


def _sign_excess(row: Module) -> float | None:
    if len(row.adapters) < 2 or row.sign_conflict is None or row.unrelated is None:
        return None
    return row.sign_conflict - (1 - row.unrelated)


def _types(report: MergeReport) -> list[str]:
    return types_of(row for row in report.modules if row.layer is not None)


def _outside(report: MergeReport) -> str:
    outside = any(row.layer is None for row in report.modules)
    return " Modules outside the layers are in the table below." if outside else ""


def _gains_note(report: MergeReport) -> str:
    if sum(adapter.method == "hiplora" for adapter in report.adapters) < 2:
        return ""
    return " HiP-LoRA adapters over one basis share the directions of their gains by construction."


def _grid(report: MergeReport, value: Value) -> dict[tuple[int, int], float]:
    """Mean value by (layer, place of the type)."""
    kinds = _types(report)
    found: dict[tuple[int, int], list[float]] = {}
    for row in report.modules:
        if row.layer is not None and (number := value(row)) is not None:
            found.setdefault((row.layer, kinds.index(row.type)), []).append(number)
    return {place: sum(numbers) / len(numbers) for place, numbers in found.items()}


def _grid_panel(
    name: str, title: str, report: MergeReport, cells: heat.Cells, scale: heat.Scale, width: int
) -> Panel | None:
    if not cells:
        return None
    kinds = _types(report)
    layers = sorted({row.layer for row in report.modules if row.layer is not None})

    def draw(container: "FigureBase") -> None:
        heat.draw(container, cells, layers, [shorten(kind, _TYPE_CHARS) for kind in kinds], "layer", scale)

    means = {
        kind: mean(value for (_, row), value in cells.items() if row == place)
        for place, kind in enumerate(kinds)
    }
    words = ", ".join(f"{kind} {scale.text(value)}" for kind, value in means.items() if value is not None)
    return Panel(name, title, f"Mean over the layers: {words}.", draw, width, _CHROME + _ROW * len(kinds))


def _matrix_panel(name: str, title: str, report: MergeReport, scale: heat.Scale) -> Panel | None:
    cells = _cells(report.pairs.get(name, ()))
    if not cells:
        return None
    names = [shorten(adapter.name, _NAME_CHARS) for adapter in report.adapters]
    words = ", ".join(
        f"{report.pair_name((row, column))} {scale.text(value)}"
        for (column, row), value in cells.items()
        if row < column
    )

    def draw(container: "FigureBase") -> None:
        heat.draw_matrix(container, cells, names, scale)

    width = _NARROW if len(names) <= _MOST_IN_NARROW else _WIDE
    return Panel(f"pairs-{name}", title, f"{words}.", draw, width, _MATRIX_CHROME + _MATRIX_ROW * len(names))


def _cells(matrix: Sequence[Sequence[float | None]]) -> dict[tuple[int, int], float]:
    return {
        (column, row): value
        for row, values in enumerate(matrix)
        for column, value in enumerate(values)
        if value is not None
    }
