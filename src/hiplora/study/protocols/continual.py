"""One adapter trained on one domain after the other: the whole matrix of scores, AvgAcc and Forgetting (C.4)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd
from pydantic import Field

from hiplora.metrics import CONTINUAL
from hiplora.study.protocols.settings import OfMethods
from hiplora.study.protocols.single_task import drift_table
from hiplora.study.records import (
    BASE,
    Findings,
    by_form,
    joined,
    measured,
    paper_value,
    scored,
    tidy,
    with_differences,
    with_jobs,
)
from hiplora.study.statistics import averaged, drift, ratios, replicates, summary

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
    order: list[str] | None = Field(default=None, min_length=2, description="Domains in order; as they stand.")


def jobs(study: Study, settings: Continual) -> list[Job]:
    """Score the base, and every stage of every method and seed on the tasks of all domains."""
    return [job for job, _ in _runs(study, settings)]


def tables(study: Study, settings: Continual, results: Results) -> Findings:
    """Return the paper's numbers in both forms, every task after every stage, and the drift after the last stage."""
    runs = list(_runs(study, settings))
    records = tidy(results, runs)
    titles = {domain: study.recipe.domains[domain].title for domain in _order(study, settings)}
    moved = drift(records[(records.stage == len(titles)) & (records.method != BASE)])
    numbers = _measured(study, settings, records)
    found = Findings(settings.name, settings.title, with_jobs(joined(numbers, moved), runs))
    shown = numbers[numbers.metric.isin(COLUMNS)].assign(column=numbers.metric.map(COLUMNS))
    found.tables = by_form(settings.name, settings.title, shown, paper=_paper)
    scores = numbers[numbers.metric == "score"]
    after = dict(enumerate((f", after {title}" for title in titles.values()), 1)) | {0: ""}
    scores = scores.assign(row=scores.method + scores.stage.map(after), column=scores.domain.map(titles))
    found.tables |= by_form(f"{settings.name}-stages", "Every task after every stage, %", scores, "row")
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
    order = _order(study, settings)
    domains = {study.recipe.domains[domain].task: domain for domain in order}
    items = scored(records)
    items = items[items.task.isin(domains)].assign(domain=items.task.map(domains))
    draws = replicates(items, ["form", "method", "seed", "stage", "domain"])
    columns = ["form", "method", "metric", "stage", "domain", "estimate", "low", "high"]
    if draws.empty:
        return joined(columns=columns)
    is_base = draws.index.get_level_values("method") == BASE
    base = averaged(draws[is_base], ["domain", "stage"])
    parts = [measured(summary(draws), "score", "%"), measured(summary(base), "average accuracy", "%")]
    matrix = pd.MultiIndex.from_product([range(1, len(order) + 1), order])
    by, learned = ["form", "method", "seed"], draws[~is_base]
    for metric, function in CONTINUAL.items() if len(learned) else ():
        values = {
            label: function(rows.droplevel(by).reindex(matrix).to_numpy().reshape(len(order), len(order), -1))
            for label, rows in learned.groupby(level=by, sort=False)
        }
        found = pd.DataFrame(values.values(), pd.MultiIndex.from_tuples(values, names=by))
        parts.append(with_differences(found, metric, "%" if "accuracy" in metric else "pp"))
        if metric == "forgetting":
            over = ratios(averaged(found, ["seed"]))
            parts.append(measured(over, "forgetting ratio", "ratio", seeds=len(study.seeds(settings))))
    return joined(*parts, columns=columns)


def _paper(row: Any) -> float | None:
    shown = row.metric in ("average accuracy", "forgetting")
    return paper_value("continual", row.method, row.column) if shown else None
