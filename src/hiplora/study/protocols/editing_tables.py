"""How editing is shown: a table a set and mode, one by categories, the course of a sequence, measurements."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hiplora.recipes.protocols import Editing
from hiplora.reporting.study.paper import paper_value
from hiplora.reporting.study.spec import Cell, Measurement, Plot, Series, Table
from hiplora.study.protocols.drifts import Drifts
from hiplora.study.protocols.editing_runs import BY_CATEGORY, Edited, Metric
from hiplora.study.protocols.show import NONE, cell, difference, marked, measurement, smallest_told
from hiplora.study.statistics import estimate, ratio

NAME, BUILT_IN = "editing", "builtin"
SHOWN = {  # metric → heading, what is better (empty: neither), unit
    "edit success": ("Edit success", "high", "%"),
    "preferred": ("log p(new) > log p(old)", "high", "%"),
    "match": ("Match", "high", "%"),
    "paraphrase success": ("Paraphrase", "high", "%"),
    "neighbours kept": ("Neighbours kept", "high", "%"),
    "locality": ("Locality: accuracy lost", "low", "pp"),
    "locality damage": ("Answers changed", "low", "%"),
    "log-probability change": ("Log p of unrelated answers", "high", "nats"),
    "edited log-probability change": ("Log p of edited targets", "low", "nats"),
}

LOST = {  # metric of the unrelated questions → the ratio of what two methods lost, sign of a loss
    "locality damage": ("locality damage ratio", 1),
    "locality": ("lost accuracy ratio", 1),
    "log-probability change": ("lost log-probability ratio", -1),
}


def set_title(settings: Editing, name: str) -> str:
    """Return a set's title, its name if it has none."""
    return settings.sets[name].title or name


def edits_table(
    settings: Editing, name: str, mode: str, found: Sequence[Edited], moved: Drifts, rates: str
) -> Table:
    """Return the table of a set and mode; `rates` says what was trained with."""
    metrics = [metric for metric in SHOWN if any(metric in one.metrics for one in found)] or list(SHOWN)[:4]
    texts = list(dict.fromkeys(text for values in moved.values() for text in values))
    rows: list[tuple[str, list[Cell]]] = []
    for one in found:
        cells = [_cell(settings, name, mode, one, metric) for metric in metrics]
        kls = [moved.get(one.title, {}).get(text) for text in texts]
        cells += [Cell(1000 * float(np.mean(kl)), digits=2) if kl else NONE for kl in kls]
        rows.append((one.title, cells))
    columns = ["Method", *(SHOWN[metric][0] for metric in metrics), *(f"Drift, {text}" for text in texts)]
    best = {place: SHOWN[metric][1] for place, metric in enumerate(metrics)}
    best |= dict.fromkeys(range(len(metrics), len(metrics) + len(texts)), "low")
    counts = f"{found[0].edits:,} edits, {found[0].questions:,} unrelated questions. " if found else ""
    if counts and mode == "batch" and settings.edits_per_batch and settings.edits_per_batch < found[0].edits:
        counts += (
            f"Batches of {settings.edits_per_batch}, each on the bare model: what is asked of a model, it is asked "
            "after one batch, and the mean is over the batches. "
        )
    note = (
        f"{counts}Shares in per cent, with 95 % intervals over edits and questions. Edit success: the answer matches "
        "or is likelier than the old one. Locality: accuracy before − after on the unrelated questions, in pp; answers "
        "changed: of all of them, in per cent. Log p: mean change in nats, of the questions' own answers, and of the "
        "edits' new ones where they do not belong; lower is better there. Drift: KL from the base in thousandths of a "
        f"nat a token. ±: standard deviation over seeds. {rates}"
    )
    title = f"{set_title(settings, name)}, {mode}"
    return Table(f"{NAME}-{name}-{mode}", title, columns, marked(rows, best), note.strip())


def _cell(settings: Editing, name: str, mode: str, one: Edited, metric: str) -> Cell:
    if metric not in one.metrics:
        return NONE
    column = {"edit success": "Edit success", "locality": "Locality"}.get(metric)
    of_paper = column is not None and _of_paper(settings, name, mode)
    paper = paper_value("editing", one.title, column) if of_paper and column is not None else None
    return cell(
        estimate(one.metrics[metric].draws, one.metrics[metric].by_seed),
        paper,
        2 if SHOWN[metric][2] == "nats" else 1,
    )


def _of_paper(settings: Editing, name: str, mode: str) -> bool:
    """Whether a set and mode are those that the paper's numbers are of: EditSet, all categories, in batches."""
    facts = settings.sets[name]
    return mode == "batch" and facts.edits == BUILT_IN and facts.category is None


def categories_table(settings: Editing, name: str, mode: str, found: Sequence[Edited]) -> Table:
    """Return the table of success by category: Table 10 of the paper, of which no number is left."""
    categories = sorted({category for one in found for category in one.categories})
    of_paper = _of_paper(settings, name, mode)
    rows: list[tuple[str, list[Cell]]] = []
    for one in found:
        cells = []
        for category in categories:
            for metric in BY_CATEGORY:
                success = of_paper and metric == "edit success"
                row = f"{one.title}, {category}"
                paper = paper_value("editing-categories", row, "Edit success") if success else None
                found_here = one.categories[category][metric]
                cells.append(cell(estimate(found_here.draws, found_here.by_seed), paper))
        rows.append((one.title, cells))
    columns = [f"{category}, {metric.split()[0]}" for category in categories for metric in BY_CATEGORY]
    counts = ", ".join(
        f"{category}: {values[BY_CATEGORY[0]].items}" for category, values in found[0].categories.items()
    )
    return Table(
        f"{NAME}-{name}-{mode}-categories",
        f"{set_title(settings, name)}, {mode}: by category",
        ["Method", *columns],
        marked(rows, dict.fromkeys(range(len(columns)), "high")),
        "Success in per cent, asked as taught and in other words. ±: standard deviation over seeds. Edits by "
        f"category: {counts}.",
    )


def course_plot(settings: Editing, name: str, found: Sequence[Edited]) -> Plot:
    """Return the figure of a sequence: the success of all edits so far, with its interval, over their number."""
    series = []
    for one in found:
        values = [estimate(success.draws) for _, success in one.course]
        series.append(
            Series(
                one.title,
                [float(count) for count, _ in one.course],
                [value.value for value in values],
                low=[value.low or 0.0 for value in values],
                high=[value.high or 0.0 for value in values],
            )
        )
    title = f"{set_title(settings, name)}: edits that still work, stage after stage"
    return Plot(f"{NAME}-{name}-sequence", title, "edits so far", "edit success (%)", series)


def edits_text(settings: Editing, name: str, mode: str, found: Sequence[Edited]) -> str:
    """Say how many edits succeeded, what that changed elsewhere, and the smallest difference that can be told."""
    told = []
    for metric, words in (
        ("edit success", "edits that took"),
        ("locality damage", "unrelated answers changed"),
    ):
        values = [(one.title, one.metrics[metric].draws) for one in found if metric in one.metrics]
        if values:
            shares = ", ".join(f"{title} {draws[0]:.1f} %" for title, draws in values)
            told.append(f"{words}: {shares}. {smallest_told([draws for _, draws in values])}".strip())
    return f"{set_title(settings, name)}, {mode}, {' Further, '.join(told)}"


def edits_measurements(name: str, mode: str, found: Sequence[Edited]) -> Iterator[Measurement]:
    """Yield every metric, by category and stage too, and every method's differences and ratios to those before it."""
    setting = {"set": name, "mode": mode}
    for place, one in enumerate(found):
        for metric, value in one.metrics.items():
            yield _measured(one, metric, value, setting, SHOWN[metric][2])
        for category, metrics in one.categories.items():
            for metric, value in metrics.items():
                yield _measured(one, f"{metric} by category", value, {**setting, "category": category})
        for stage, (count, success) in enumerate(one.course, 1):
            yield _measured(one, "edit success so far", success, {**setting, "stage": stage, "edits": count})
        for against in found[:place]:
            yield from _compared(one, against, setting)


def _measured(
    one: Edited, name: str, value: Metric, setting: Mapping[str, Any], unit: str = "%"
) -> Measurement:
    return measurement(
        NAME, one.title, name, estimate(value.draws, value.by_seed), one.jobs, unit=unit, items=value.items,
        setting=setting, seeds=len(one.jobs),
    )  # fmt: skip


def _compared(one: Edited, against: Edited, setting: Mapping[str, Any]) -> Iterator[Measurement]:
    """Paired differences, and ratios of what was lost; their interval may be open where the other lost little."""
    seeds = len(one.jobs)
    for metric in one.metrics:
        if metric in against.metrics:
            unit = "nats" if SHOWN[metric][2] == "nats" else "pp"
            here, there = one.metrics[metric], against.metrics[metric]
            sides = (one.title, here.draws, one.jobs), (against.title, there.draws, against.jobs)
            by_seed = here.by_seed, there.by_seed
            yield difference(
                NAME,
                metric,
                *sides,
                by_seed=by_seed,
                unit=unit,
                items=here.items,
                setting=setting,
                seeds=seeds,
            )
    for metric, (name, sign) in LOST.items():
        if metric in one.metrics and metric in against.metrics:
            here, there = one.metrics[metric], against.metrics[metric]
            yield measurement(
                NAME, one.title, name, ratio(sign * here.draws, sign * there.draws), [*one.jobs, *against.jobs],
                unit="ratio", setting={**setting, "over": against.title}, seeds=seeds, items=here.items,
            )  # fmt: skip
