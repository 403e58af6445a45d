"""One adapter trained on one domain after the other: the whole matrix of scores, AvgAcc and Forgetting (C.4)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd
from pydantic import Field

from hiplora.metrics import CONTINUAL
from hiplora.reporting import plots
from hiplora.study.protocols.settings import OfMethods
from hiplora.study.protocols.single_task import PAPER_COLUMNS, drift_table
from hiplora.study.records import (
    BASE,
    Findings,
    joined,
    measured,
    paper_value,
    scored,
    table,
    tidy,
    with_jobs,
)
from hiplora.study.statistics import averaged, differences, drift, ratios, replicates, summary

if TYPE_CHECKING:
    from hiplora.study.builder import Study
    from hiplora.study.jobs import Job
    from hiplora.study.store import Results

COLUMNS = {
    "average accuracy": "AvgAcc",
    "forgetting": "Forgetting",
    "backward transfer": "Backward transfer",
    "learned accuracy": "Just after training",
}


class Continual(OfMethods):
    """One adapter trained on one domain after the other."""

    name: ClassVar[str] = "continual"
    title: ClassVar[str] = "Continual tuning"
    order: list[str] | None = Field(
        default=None, min_length=2, description="Domains in order; as they stand."
    )


def jobs(study: Study, settings: Continual) -> list[Job]:
    """Score the base, and every stage of every method and seed on the tasks of all domains."""
    return [job for job, _ in _runs(study, settings)]


def tables(study: Study, settings: Continual, results: Results) -> Findings:
    """Return the paper's numbers in both forms, every task after every stage, and the drift after the last stage."""
    runs = list(_runs(study, settings))
    records = tidy(results, runs)
    found = Findings(settings.name, settings.title)
    order = _order(study, settings)
    last = records[(records.stage == len(order)) & (records.method != BASE)]
    moved = drift(last)
    numbers = _measured(study, settings, records)
    found.measured = with_jobs(joined(numbers, moved), runs)
    titles = {domain: study.recipe.domains[domain].title for domain in order}
    for form in ("accuracy", "likelihood"):
        rows = numbers[numbers.form == form]
        shown = rows[rows.metric.isin(COLUMNS)].assign(column=rows.metric.map(COLUMNS))
        found.tables[f"{settings.name}-{form}"] = (
            f"{settings.title}: {form}",
            table(shown, "column", paper=_paper),
        )
        scores = rows[rows.metric == "score"]
        after = ["" if not stage else f", after {titles[order[int(stage) - 1]]}" for stage in scores.stage]
        scores = scores.assign(row=scores.method + after, column=scores.domain.map(titles))
        caption = f"Every task after every stage: {form}, %"
        found.tables[f"{settings.name}-stages-{form}"] = (
            caption,
            table(scores, "column", "row", paper=lambda r: _cell(study, r)),
        )
        for place, (method, one) in enumerate(scores[scores.method != BASE].groupby("method", sort=False)):
            name = f"{settings.name}-matrix-{form}-{place}"
            wide = one.pivot(index="stage", columns="column", values="estimate")[list(titles.values())]
            wide.index = [f"after {titles[order[int(stage) - 1]]}" for stage in wide.index]
            found.figures[name] = (
                f"{method}: every task after every stage, {form}",
                plots.heatmap(wide, fmt=".1f", colorbar="%"),
            )
    if not moved.empty:
        found.tables[f"{settings.name}-drift"] = drift_table(moved, "Drift after all stages")
    found.text = (
        "AvgAcc: mean over the tasks after the last stage; Forgetting: mean fall from the best earlier stage, lower is "
        "better; backward transfer: mean change since a task's own stage. Intervals: 95 % over items."
    )
    return found


def _order(study: Study, settings: Continual) -> list[str]:
    return list(settings.order or study.recipe.domains)


def _runs(study: Study, settings: Continual) -> Iterator[tuple[Job, dict]]:
    yield study.score(), {"method": BASE, "stage": 0}
    for method in settings.methods:
        row = study.row(method)
        for seed in study.seeds(settings):
            adapter = None
            for stage, domain in enumerate(_order(study, settings), 1):
                adapter = study.adapter(row, domain, seed, start=adapter)
                yield study.score(adapter), {"method": row.title, "seed": seed, "stage": stage}


def _measured(study: Study, settings: Continual, records: pd.DataFrame) -> pd.DataFrame:
    domains = {study.recipe.domains[domain].task: domain for domain in _order(study, settings)}
    items = scored(records)
    items = items[items.task.isin(domains)].assign(domain=items.task.map(domains))
    draws = replicates(items, ["form", "method", "seed", "stage", "domain"])
    columns = ["form", "method", "metric", "stage", "domain", "estimate"]
    if draws.empty:
        return joined(columns=columns)
    parts = [measured(summary(draws), "score", "%")]
    is_base = draws.index.get_level_values("method") == BASE
    parts.append(measured(summary(averaged(draws[is_base], ["domain", "stage"])), "average accuracy", "%"))
    learned = draws[~is_base]
    for metric, function in CONTINUAL.items() if len(learned) else ():
        values = {
            label: function(_matrix(rows, list(domains.values())))
            for label, rows in learned.groupby(level=["form", "method", "seed"], sort=False)
        }
        found = pd.DataFrame(
            values.values(), pd.MultiIndex.from_tuples(values, names=["form", "method", "seed"])
        )
        unit = "%" if "accuracy" in metric else "pp"
        parts.append(measured(summary(found), metric, unit))
        parts.append(measured(summary(differences(found)), f"{metric} difference", "pp"))
        if metric == "forgetting":
            over = ratios(averaged(found, ["seed"]))
            parts.append(measured(over, "forgetting ratio", "ratio", seeds=len(study.seeds(settings))))
    return joined(*parts, columns=columns)


def _matrix(rows: pd.DataFrame, domains: list[str]) -> Any:
    """A run's scores as (stages, tasks, 1 + replicates)."""
    stages = rows.droplevel(["form", "method", "seed"])
    return (
        stages.reindex(pd.MultiIndex.from_product([range(1, len(domains) + 1), domains]))
        .to_numpy()
        .reshape(len(domains), len(domains), -1)
    )


def _paper(row: Any) -> float | None:
    shown = row.form == "accuracy" and row.metric in ("average accuracy", "forgetting")
    return paper_value("continual", row.method, row.column) if shown else None


def _cell(study: Study, row: Any) -> float | None:
    task = study.recipe.domains[row.domain].task
    known = row.form == "accuracy" and row.stage
    return paper_value("continual-matrix", row.row, PAPER_COLUMNS.get(task, task)) if known else None
