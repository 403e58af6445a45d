"""Each method trained on each domain alone and scored on all of them: Table 1 of the paper, with Retain (Eq. 11).

The comparison with AdaLoRA (Table 12) is the same table of other methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd

from hiplora.reporting import plots
from hiplora.study.protocols.settings import OfMethods
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
from hiplora.study.statistics import averaged, drift, hierarchical, replicates, summary

if TYPE_CHECKING:
    from hiplora.study.builder import Study
    from hiplora.study.jobs import Job
    from hiplora.study.store import Results


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
    numbers, moved = scores_and_retain(study, records), drift(records[records.method != BASE])
    found = Findings(settings.name, settings.title, with_jobs(joined(numbers, moved), runs))
    found.tables = by_form(
        settings.name,
        f"{settings.title}, %",
        score_columns(study, numbers),
        paper=lambda row: paper_value(settings.name, row.method, row.column),
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
    rows = [study.row(method) for method in settings.methods]
    return score_runs(study, rows, study.seeds(settings), study.recipe.domains)


def score_runs(
    study: Study, rows: Any, seeds: Sequence[int], domains: Any, like: Any = None
) -> list[tuple[Job, dict]]:
    """Return the jobs that score the base, and the adapters of methods on domains, with their labels.

    `like` is the method whose learning rate all of them take.
    """
    found: list[tuple[Job, dict]] = [(study.score(), {"method": BASE})]
    for row in rows:
        for seed in seeds:
            for domain in domains:
                job = study.score(study.adapter(row, domain, seed, like=like))
                found.append((job, {"method": row.title, "domain": domain, "seed": seed}))
    return found


def scores_and_retain(study: Study, records: pd.DataFrame) -> pd.DataFrame:
    """Return each method's scores on its own domains, their mean, Retain, and paired differences, as measurements."""
    domains = {domain.task: name for name, domain in study.recipe.domains.items()}
    items = scored(records)
    items = items[items.task.isin(domains)].assign(on=items.task.map(domains))
    if BASE not in set(items.method):
        return joined(columns=["method", "form", "metric", "estimate", "low", "high", "domain"])
    trained = items.method != BASE
    items["domain"] = items.domain.where(trained, items.on)  # each domain is the base's own
    draws = replicates(items, ["form", "method", "domain", "seed", "on"])
    is_own = draws.index.get_level_values("domain") == draws.index.get_level_values("on")
    own, others = draws[is_own].droplevel("on"), draws[~is_own]
    base = own.xs(BASE, level="method").droplevel("seed").rename_axis(index={"domain": "on"})
    drops = others.rsub(base.reindex(others.index.droplevel(["method", "domain", "seed"])).to_numpy())
    wide = hierarchical(items[trained & (items.domain == items.on)], ["form", "method", "domain"])
    scores = measured(summary(own).join(wide), "score", "%")
    return joined(
        scores.assign(items=scores.domain.map(items.groupby("on")["item"].nunique())),
        with_differences(averaged(own, ["domain"]), "mean score", "%"),
        with_differences(averaged(drops, ["domain", "on"]), "retain"),
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
    shown = moved[moved.metric == "drift"].rename(columns={"method": "Method"})
    wide = 1000 * shown.pivot_table(index="Method", columns="text", values="estimate", sort=False)
    return f"{title}: KL in thousandths of a nat a token", wide.rename_axis(columns=None).round(2)


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


def _trained(study: Study, settings: SingleTask, results: Results) -> pd.DataFrame:
    """What each method trained: parameters, learning rate, held-out loss before and after."""
    runs = [(job.needs["adapter"], labels) for job, labels in _runs(study, settings)[1:]]
    means = tidy(results, runs).pivot_table(index="method", columns="metric", values="value", sort=False)
    rates = {}
    for row in map(study.row, settings.methods):
        choice, given = study.rate(row), {"value": study.recipe.given_rate(row)}
        found = given if choice is None else results.get(choice) or {}
        edge = "at the edge of the grid" if found.get("at_the_edge") else ""
        rates[row.title] = {"Learning rate": found.get("value"), "": edge}
    found = pd.DataFrame.from_dict(rates, orient="index").rename_axis("Method")
    means = means.reindex(found.index, columns=["parameters", "held_out_before", "held_out_after"])
    found.insert(0, "Trainable parameters", means.parameters.astype("Int64"))
    return found.assign(**{"Held-out loss before": means.held_out_before, "After": means.held_out_after})
