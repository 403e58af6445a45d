"""Edits: how many work alone and after the merge, and how many of them survive it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hiplora.reporting._old_plots import bars
from hiplora.reporting.canvas import Panel, Plate
from hiplora.reporting.numbers import percent, significant
from hiplora.reporting.palette import Look
from hiplora.reporting.results import EditRun, Results

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

NOT_MEASURED = "not measured"


def plate(results: Results, looks: Mapping[str, Look]) -> Plate | None:
    """Return the plate of edit success per set and of survival, or None where no edits were measured."""
    panels = [
        panel for panel in (success(results, looks), survival(results.edits, looks)) if panel is not None
    ]
    if not panels:
        return None
    counts = [count for count in results.edit_counts.values() if count]
    smallest = (
        f" In a set of {counts[0]:.0f}, one edit is {significant(100 / counts[0], 2)} points."
        if counts
        else ""
    )
    return Plate(
        name="edits",
        heading="What survives the merge",
        caption="Each set of edits is trained apart; then the adapters of one method are added together. Open bar: the "
        "set's adapter alone. Filled bar: after the merge. Upright line: the base model before any edit. Survival is "
        "the share of the edits that worked alone and still work after the merge." + smallest,
        panels=panels,
        legend={run.name: looks[run.name] for run in results.edits},
    )


def success(results: Results, looks: Mapping[str, Look]) -> Panel | None:
    """Return the panel of edit success per set, alone (open) and merged (filled), or None."""
    names = dict.fromkeys(
        [*results.edit_counts, *(name for run in results.edits for name in [*run.alone, *run.merged])]
    )
    groups = [
        bars.Group(
            label=_set_label(name, results.edit_counts.get(name)),
            bars=[_success_bar(run, name) for run in results.edits],
            reference=results.base_success.get(name),
        )
        for name in names
    ]
    if not any(bar.value is not None or bar.outline is not None for group in groups for bar in group.bars):
        return None

    def draw(container: "FigureBase") -> None:
        bars.draw(container, groups, looks, "edits that work", limit=1.0, ticks=percent)

    return Panel(
        "edits-success", "Edits that work: alone → merged", bars.words(groups), draw, 460, bars.height(groups)
    )


def survival(runs: Sequence[EditRun], looks: Mapping[str, Look]) -> Panel | None:
    """Return the panel of survival per method, or None where it was not measured."""
    if all(run.survival is None for run in runs):
        return None
    group = bars.Group(
        "",
        [
            bars.Bar(run.name, run.survival, NOT_MEASURED if run.survival is None else percent(run.survival))
            for run in runs
        ],
    )

    def draw(container: "FigureBase") -> None:
        bars.draw(container, [group], looks, "share of the edits that worked alone", limit=1.0, ticks=percent)

    return Panel(
        "edits-survival",
        "Edits that survive the merge",
        bars.words([group]),
        draw,
        420,
        bars.height([group]) + 10,
    )


def _set_label(name: str, count: float | None) -> str:
    return f"{name} ({count:.0f} edits)" if count else name


def _success_bar(run: EditRun, name: str) -> bars.Bar:
    alone, merged = run.alone.get(name), run.merged.get(name)
    if alone is None and merged is None:
        return bars.Bar(run.name, None, NOT_MEASURED)
    text = f"{percent(alone)} → {percent(merged)}" if alone is not None else percent(merged)
    return bars.Bar(run.name, merged, text, outline=alone)
