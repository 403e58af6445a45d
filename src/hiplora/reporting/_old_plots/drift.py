"""How far the models moved from their base on text outside the data: KL divergence and perplexity ratio."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from hiplora.reporting._old_plots import bars
from hiplora.reporting.canvas import Panel, Plate
from hiplora.reporting.numbers import MINUS, NBSP, change, finite, significant
from hiplora.reporting.palette import Look
from hiplora.reporting.results import Drift, EditRun, Method

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

Drifts = Mapping[str, Sequence[Drift]]
KL_UNIT = "nats per token"
NOT_MEASURED = "not measured"
_CAPTION = (
    "Measured on text that is not in the data. KL divergence of the adapted model's next-token predictions from the "
    "base model's: zero means that nothing changed. Perplexity is compared with the base model's on the same text."
)


def plate(methods: Sequence[Method], looks: Mapping[str, Look], merged: bool = False) -> Plate | None:
    """Return the drift plate of trained methods, or None where no drift was measured.

    `merged` says that the drift of merged adapters is shown as well, from which this one must be told apart.
    """
    heading = "What changed elsewhere before the merge" if merged else "What changed elsewhere"
    drifts = {method.name: method.drift for method in methods if method.drift}
    return _plate("drift", heading, _CAPTION, drifts, {}, looks)


def merged_plate(runs: Sequence[EditRun], looks: Mapping[str, Look]) -> Plate | None:
    """Return the drift plate of merged adapters, the single ones as open dots, or None."""
    drifts = {run.name: run.drift for run in runs if run.drift}
    singles = {run.name: [row for drift in run.alone_drift.values() for row in drift] for run in runs}
    dots = (
        " Bars: the adapters added together. Open dots: each adapter alone." if any(singles.values()) else ""
    )
    return _plate("merge-drift", "What the merge changed elsewhere", _CAPTION + dots, drifts, singles, looks)


def kl_panel(
    name: str,
    drifts: Drifts,
    singles: Drifts,
    looks: Mapping[str, Look],
) -> Panel | None:
    """Return the panel of KL divergences per text and method, or None where none is finite."""
    groups = _groups(drifts, singles, lambda row: row.kl, significant)
    return _panel(
        name, "KL divergence from the base model", groups, looks, f"KL divergence ({KL_UNIT})", 0.0, None
    )


def perplexity_panel(
    name: str,
    drifts: Drifts,
    singles: Drifts,
    looks: Mapping[str, Look],
) -> Panel | None:
    """Return the panel of perplexity changes per text and method, or None where none is finite."""
    groups = _groups(drifts, singles, lambda row: row.perplexity_ratio, change)
    return _panel(
        name, "Change of perplexity", groups, looks, "perplexity, against the base model", 1.0, _change_tick
    )


def _plate(
    name: str,
    heading: str,
    caption: str,
    drifts: Drifts,
    singles: Drifts,
    looks: Mapping[str, Look],
) -> Plate | None:
    panels = [
        panel
        for panel in (
            kl_panel(f"{name}-kl", drifts, singles, looks),
            perplexity_panel(f"{name}-perplexity", drifts, singles, looks),
        )
        if panel is not None
    ]
    if not panels:
        return None
    return Plate(name, heading, caption, panels, {method: looks[method] for method in drifts})


def _groups(
    drifts: Drifts,
    singles: Drifts,
    get: Callable[[Drift], float | None],
    text: Callable[[float], str],
) -> list[bars.Group]:
    """One group a text, in the order of first mention; a method without that text says so at its place."""
    names = list(dict.fromkeys(row.text for rows in drifts.values() for row in rows))
    groups = []
    for name in names:
        row_bars = []
        for method, rows in drifts.items():
            value = next((get(row) for row in rows if row.text == name), None)
            dots = finite(get(row) for row in singles.get(method, ()) if row.text == name)
            row_bars.append(
                bars.Bar(method, value, NOT_MEASURED if value is None else text(value), dots=tuple(dots))
            )
        groups.append(bars.Group(name, row_bars))
    return groups


def _panel(
    name: str,
    title: str,
    groups: Sequence[bars.Group],
    looks: Mapping[str, Look],
    xlabel: str,
    start: float,
    ticks: Callable[[float], str] | None,
) -> Panel | None:
    if not finite(bar.value for group in groups for bar in group.bars):
        return None

    def draw(container: "FigureBase") -> None:
        bars.draw(container, groups, looks, xlabel, start=start, ticks=ticks)

    return Panel(name, title, bars.words(groups), draw, 460, bars.height(groups))


def _change_tick(ratio: float) -> str:
    value = round(100 * (ratio - 1), 6)
    return f"{value:+,g}{NBSP}%".replace("-", MINUS) if value else f"0{NBSP}%"
