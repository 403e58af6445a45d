"""Each method trained on each domain alone and scored on all of them: Table 1 of the paper, with Retain (Eq. 11).

The comparison with AdaLoRA (Table 12) is the same table of other methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from hiplora.reporting import plots
from hiplora.study.protocols.settings import OfMethods
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
from hiplora.study.statistics import averaged, differences, drift, hierarchical, replicates, summary

if TYPE_CHECKING:
    from hiplora.study.builder import Study
    from hiplora.study.jobs import Job
    from hiplora.study.store import Results

PAPER_COLUMNS = {
    "mmlu": "MMLU",
    "scienceqa": "ScienceQA",
    "gsm8k": "GSM8K",
    "gsm8k_solution": "GSM8K",
    "humaneval": "HumanEval",
    "humaneval_10": "HumanEval",
}


class SingleTask(OfMethods):
    """Each method trained on each domain alone, scored on all: the paper's single-task table with Retain."""

    name: ClassVar[str] = "single-task"
    title: ClassVar[str] = "Single tasks"


class AdaLora(SingleTask):
    """The same table for the comparison with AdaLoRA."""

    name: ClassVar[str] = "adalora"
    title: ClassVar[str] = "Comparison with AdaLoRA"


def jobs(study: Study, settings: SingleTask) -> list[Job]:
    """Score the base, and the adapter of every method, domain and seed."""
    return [job for job, _ in _runs(study, settings)]


def tables(study: Study, settings: SingleTask, results: Results) -> Findings:
    """Return the domains' scores and Retain in both forms, the drift, and what was trained."""
    runs = _runs(study, settings)
    records = tidy(results, runs)
    found = Findings(settings.name, settings.title)
    numbers = with_jobs(scores_and_retain(study, records), runs)
    moved = with_jobs(drift(records[records.method != BASE]), runs)
    found.measured = joined(numbers, moved)
    for form in ("accuracy", "likelihood"):
        shown = score_columns(study, numbers[numbers.form == form])
        found.tables[f"{settings.name}-{form}"] = (
            f"{settings.title}: {form}, %",
            table(shown, "column", paper=lambda row: _paper(study, settings.name, row)),
        )
    found.tables[f"{settings.name}-drift"] = drift_table(moved)
    found.tables[f"{settings.name}-training"] = "What was trained", _trained(study, settings, results)
    found.text = (
        "Each domain is scored by the adapter that was trained on it. Retain: mean drop on the other domains' tasks "
        "against the base model, in percentage points; lower is better. Intervals: 95 % over items."
    )
    figure = retain_figure(numbers)
    if figure is not None:
        found.figures[f"{settings.name}-retain"] = "What was learned, and what it cost elsewhere", figure
    return found


def _runs(study: Study, settings: SingleTask) -> list[tuple[Job, dict]]:
    titles = {method: study.row(method) for method in settings.methods}
    return score_runs(study, titles.values(), study.seeds(settings), study.recipe.domains)


def score_runs(
    study: Study, rows: Any, seeds: Sequence[int], domains: Any, like: Any = None
) -> list[tuple[Job, dict]]:
    """Return the jobs that score the base, and the adapters of methods on domains, with their labels.

    `like` is the method whose learning rate all of them take.
    """
    found = [(study.score(), {"method": BASE})]
    for row in rows:
        for seed in seeds:
            for domain in domains:
                job = study.score(study.adapter(row, domain, seed, like=like))
                found.append((job, {"method": row.title, "domain": domain, "seed": seed}))
    return found


def scores_and_retain(study: Study, records: pd.DataFrame) -> pd.DataFrame:
    """Return each method's scores on its own domains, their mean, Retain, and paired differences, as measurements."""
    domains = {domain.task: name for name, domain in study.recipe.domains.items()}
    records = scored(records)
    records = records[records.task.isin(domains)]
    if BASE not in set(records.method):
        return pd.DataFrame(columns=["method", "form", "metric", "estimate", "low", "high", "domain"])
    draws = replicates(records, ["form", "method", "domain", "seed", "task"])
    scored_on = draws.index.get_level_values("task").map(domains)
    is_base = draws.index.get_level_values("method") == BASE
    base, adapted = draws[is_base], draws[~is_base]
    own = adapted[scored_on[~is_base] == adapted.index.get_level_values("domain")]
    own = own.droplevel("task")
    alone = base.droplevel(["domain", "task"])
    alone = alone.set_index(pd.Index(scored_on[is_base], name="domain"), append=True).reorder_levels(
        own.index.names
    )
    apart = adapted[scored_on[~is_base] != adapted.index.get_level_values("domain")]
    before = base.droplevel(["method", "domain", "seed"]).reindex(
        apart.index.droplevel(["method", "domain", "seed"])
    )
    retain = averaged(pd.DataFrame(before.to_numpy() - apart.to_numpy(), apart.index), ["domain", "task"])
    mean, every = averaged(own, ["domain"]), averaged(alone, ["domain"])
    trained = records[records.task.map(domains) == records.domain]
    counts = records.groupby(records.task.map(domains))["item"].nunique()
    scores = summary(own).join(hierarchical(trained, ["form", "method", "domain"]))
    return pd.concat(
        [
            measured(pd.concat([summary(alone), scores]), "score", "%").assign(
                items=lambda one: one.domain.map(counts)
            ),
            measured(summary(pd.concat([every, mean])), "mean score", "%"),
            measured(summary(retain), "retain", "pp"),
            measured(summary(differences(mean)), "mean score difference", "pp"),
            measured(summary(differences(retain)), "retain difference", "pp"),
        ],
        ignore_index=True,
    )


def score_columns(study: Study, numbers: pd.DataFrame, mean: str = "Mean") -> pd.DataFrame:
    """Return the measurements that a table of scores and Retain shows, with their column."""
    shown = numbers[numbers.metric.isin(("score", "mean score", "retain"))]
    titles = {name: domain.title for name, domain in study.recipe.domains.items()}
    headings = shown.metric.map({"mean score": mean, "retain": "Retain"})
    return shown.assign(column=headings.fillna(shown.domain.map(titles)))


def drift_table(moved: pd.DataFrame, title: str = "Drift from the base model") -> tuple[str, pd.DataFrame]:
    """Return the table of mean drifts, in thousandths of a nat a token."""
    if moved.empty:
        return title, pd.DataFrame()
    shown = moved[moved.metric == "drift"]
    wide = 1000 * shown.pivot(index="method", columns="text", values="estimate")
    wide = wide.reindex(index=shown.method.unique(), columns=shown.text.unique()).rename_axis(None, axis=1)
    return f"{title}: KL in thousandths of a nat a token", wide.rename_axis("Method").round(2)


def retain_figure(numbers: pd.DataFrame, label: str | None = None, title: str = "") -> Any:
    """Return the figure of Retain over the mean likelihood; None without adapters."""
    shown = numbers[(numbers.form == "likelihood") & (numbers.method != BASE)]
    if shown.empty:
        return None
    mean, retain = (shown[shown.metric == metric].set_index("method") for metric in ("mean score", "retain"))
    points = retain.join(mean[["estimate", "low", "high"]].add_prefix("x_")).reset_index()
    points["line"] = title or points.method
    return plots.frontier(
        points, "x_estimate", "estimate", "line", low="low", high="high", x_low="x_low", x_high="x_high",
        label="method" if label else None, xlabel="mean likelihood, own domain (%)",
        ylabel="Retain (pp, lower is better)",
    )  # fmt: skip


def _paper(study: Study, name: str, row: Any) -> float | None:
    if row.form != "accuracy":
        return None
    domain = study.recipe.domains.get(row.domain) if isinstance(row.domain, str) else None
    column = "Retain" if domain is None else PAPER_COLUMNS.get(domain.task, domain.task)
    return paper_value(name, row.method, column) if row.metric != "mean score" else None


def _trained(study: Study, settings: SingleTask, results: Results) -> pd.DataFrame:
    """What each method trained: parameters, learning rate, held-out loss before and after."""
    rows = []
    for method in settings.methods:
        row = study.row(method)
        runs = [
            study.adapter(row, domain, seed)
            for domain in study.recipe.domains
            for seed in study.seeds(settings)
        ]
        found = [one for job in runs if (one := results.get(job)) is not None]
        choice = study.rate(row)
        chosen = None if choice is None else results.get(choice)
        rate = study.recipe.given_rate(row) if choice is None else (chosen or {}).get("value")
        edge = "at the edge of the grid" if (chosen or {}).get("at_the_edge") else ""
        before, after = held_out(found) if len(found) == len(runs) else (None, None)
        parameters = found[0]["trainable_parameters"] if found else None
        rows.append((row.title, parameters, rate, edge, before, after))
    columns = ["Method", "Trainable parameters", "Learning rate", "", "Held-out loss before", "After"]
    return pd.DataFrame(rows, columns=columns).set_index("Method")


def held_out(trained: Sequence[dict[str, Any]]) -> tuple[float | None, float | None]:
    """Return the mean losses on held-out rows before and after some trainings; None where none were held out."""
    losses = [(one["held_out_before"], one["held_out_after"]) for one in trained]
    known = [pair for pair in losses if pair[1] is not None]
    return tuple(np.mean(known, axis=0).tolist()) if known else (None, None)  # type: ignore[return-value]
