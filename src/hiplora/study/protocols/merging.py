"""The adapters of all domains merged: before, after, and their difference, as in Tables 2 and 13 of the paper."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd
from pydantic import Field

from hiplora.study.protocols.settings import OfMethods, Positive, Rules
from hiplora.study.protocols.single_task import drift_table
from hiplora.study.records import (
    Findings,
    by_form,
    joined,
    measured,
    paper_value,
    scored,
    table,
    tidy,
    with_differences,
    with_jobs,
)
from hiplora.study.statistics import averaged, drift, replicates, summary

if TYPE_CHECKING:
    from hiplora.metrics import MergeInstance
    from hiplora.study.builder import Study
    from hiplora.study.jobs import Job
    from hiplora.study.store import Results

PASSES = (1, 5, 10)
_TITLES = {"ties": "TIES", "dare": "DARE", "knots": "KnOTS", "tsv": "TSV", "iso-c": "Iso-C"}


class Merging(OfMethods):
    """The adapters of all domains merged: scores before, after, and their difference."""

    name: ClassVar[str] = "merging"
    title: ClassVar[str] = "Merging the adapters of all domains"
    rules: Rules = Field(default={"addition": {}}, description="Merge rule → its options, as of `hiplora merge`.")
    passing: dict[str, Positive | None] = Field(
        default={}, description="Further tasks, scored for the adapter of the domain that has such a task."
    )


def rule_title(rule: str) -> str:
    """Return a merge rule's name as tables have it."""
    return _TITLES.get(rule, rule)


def merge_of(
    study: Study, row: Any, instance: MergeInstance, rule: str, options: Mapping[str, Any], drift: bool = False,
    like: Any = None,
) -> Job:  # fmt: skip
    """Return the job that merges a method's adapters of some domains and seeds, scored on their own tasks.

    The merge of all domains of one seed, which several protocols read, always has its drift measured.
    """
    adapters = {domain: study.adapter(row, domain, seed, like=like) for domain, seed in instance}
    whole = len(adapters) == len(study.recipe.domains) and len({seed for _, seed in instance}) == 1
    told = " + ".join(f"{domain} {seed}" for domain, seed in instance)
    tasks = study.tasks_of(list(adapters))
    return study.merge(adapters, rule, options, tasks, drift or whole, name=f"{row.title}, {told}")


def jobs(study: Study, settings: Merging) -> list[Job]:
    """Merge the adapters of each seed by every rule; score each merge, and each adapter, on the domains' tasks."""
    return [job for job, _ in _runs(study, settings)]


def tables(study: Study, settings: Merging, results: Results) -> Findings:
    """Return before, after and difference by rule in both forms, the mean drop of all rules, and drift."""
    runs = list(_runs(study, settings))
    records = tidy(results, runs, ("rule", "method"))
    moved = drift(records[records.when == "after"], ["rule"])
    numbers = _measured(study, settings, records)
    found = Findings(settings.name, settings.title)
    found.measured = with_jobs(joined(numbers, moved), runs, ("rule", "method"))
    rows, drops = _before_and_after(numbers), _by_rule(numbers)
    for rule in settings.rules:
        stem, caption = f"{settings.name}-{rule}", f"Merged by {rule_title(rule)}, %"
        found.tables |= by_form(stem, caption, rows[rows.rule == rule], "row", _paper)
    found.tables |= drift_tables(settings.name, settings.rules, moved)
    found.tables[f"{settings.name}-rules"] = (
        "Mean drop by rule, percentage points",
        table(drops, "column", "row", paper=_paper),
    )
    found.text = (
        "Before: each domain by its own adapter; after: all of them by the merge of the adapters of one seed, mean "
        "over the seeds. Mean drop: mean absolute difference over metrics and seeds; signed drop: a gain is "
        "negative."
    )
    return found


def drift_tables(name: str, rules: Mapping[str, Any], moved: pd.DataFrame) -> dict:
    """Return the drift of the merged models, a table a rule."""
    return {
        f"{name}-drift-{rule}": drift_table(
            moved[moved.rule == rule], f"Drift of the models merged by {rule_title(rule)}"
        )
        for rule in (rules if len(moved) else ())
    }


def _runs(study: Study, settings: Merging) -> Iterator[tuple[Job, dict]]:
    domains = list(study.recipe.domains)
    further = {domain: passing(study, settings, domain) for domain in domains}
    all_further = {task: count for tasks in further.values() for task, count in tasks.items()}
    for rule, options in settings.rules.items():
        for method in settings.methods:
            row = study.row(method)
            for seed in study.seeds(settings):
                label = {"rule": rule, "method": row.title, "seed": seed}
                adapters = {domain: study.adapter(row, domain, seed) for domain in domains}
                for domain, adapter in adapters.items():
                    alone = {**label, "when": "before", "domain": domain}
                    yield study.score(adapter), alone
                    if further[domain]:
                        yield study.score(adapter, further[domain], drift=False), alone
                instance = tuple((domain, seed) for domain in domains)
                yield merge_of(study, row, instance, rule, options), {**label, "when": "after"}
                if all_further:
                    name = f"{row.title}, {', '.join(all_further)}, seed {seed}"
                    merge = study.merge(adapters, rule, options, all_further, name=name)
                    yield merge, {**label, "when": "after"}


def passing(study: Study, settings: Merging, domain: str) -> dict[str, int | None]:
    """Return the further tasks of a domain, those that are made of the same file as one of its own.

    Raises:
        ConfigError: a task of `passing` belongs to no domain.
    """
    from hiplora.errors import ConfigError

    files = {name: {_file(task) for task in one.tasks} for name, one in study.recipe.domains.items()}
    for task in settings.passing:
        if not any(_file(task) in known for known in files.values()):
            raise ConfigError(
                f"protocols.merging.passing: task {task!r} belongs to no domain; name one that is made of the same "
                "file as a domain's own, as humaneval_10 is of humaneval, or remove it"
            )
    own = study.recipe.domains[domain].task
    return {task: n for task, n in settings.passing.items() if _file(task) in files[domain] and task != own}


def _file(task: str) -> str:
    from hiplora.evaluation.suite import own_tasks, task_settings

    return str(task_settings(task)["file"]) if task in own_tasks() else task


def _reported(study: Study, settings: Merging, records: pd.DataFrame) -> pd.DataFrame:
    """The items of what is reported: each domain's score in both forms, and pass@k where programs are sampled.

    A task's accuracy is pass@1, the share of its n samples that pass: pass@k follows from it.
    """
    from hiplora.evaluation.suite import task_samples
    from hiplora.metrics import pass_at_k

    items, parts = scored(records), []
    for name, domain in study.recipe.domains.items():
        of_domain = items[items.domain.isin((name, ""))].assign(domain=name)
        parts.append(of_domain[of_domain.task == domain.task].assign(reported=domain.title))
        for task in (domain.task, *passing(study, settings, name)):
            passed = of_domain[(of_domain.task == task) & (of_domain.form == "accuracy")]
            n = task_samples(task)
            for k in PASSES:
                if k <= n and (k > 1 or task != domain.task):
                    values = [100 * pass_at_k(n, round(share * n / 100), k) for share in passed.value]
                    parts.append(passed.assign(value=values, reported=f"{domain.title} pass@{k}"))
    return pd.concat(parts, ignore_index=True)


def _measured(study: Study, settings: Merging, records: pd.DataFrame) -> pd.DataFrame:
    by = ["rule", "form", "when", "method", "domain", "reported", "seed"]
    draws = replicates(_reported(study, settings, records), by)
    if draws.empty:
        return joined(columns=[*by, "metric", "estimate", "low", "high"])
    before, after = (draws.xs(when, level="when") for when in ("before", "after"))
    change, over = before - after, ["domain", "reported"]
    return joined(
        measured(summary(draws), "merge score", "%"),
        measured(summary(change), "drop", "pp"),
        with_differences(averaged(change.abs(), over), "mean drop"),
        measured(summary(averaged(change, over)), "mean signed drop", "pp"),
        with_differences(averaged(before, over), "score alone", "%"),
    )


def _before_and_after(numbers: pd.DataFrame) -> pd.DataFrame:
    """The measurements of a table before and after a merge, for each method the row before, after and drop."""
    shown = numbers[numbers.metric.isin(("merge score", "drop", "mean drop"))]
    when = shown.when.where(shown.metric == "merge score", "drop")
    shown = shown.assign(row=shown.method + ", " + when, column=shown.reported.fillna("Mean drop"))
    order = [f"{method}, {when}" for method in shown.method.unique() for when in ("before", "after", "drop")]
    return shown.sort_values("row", key=lambda rows: rows.map(order.index), kind="stable")


def _by_rule(numbers: pd.DataFrame) -> pd.DataFrame:
    shown = numbers[numbers.metric.isin(("mean drop", "mean signed drop"))]
    rows = shown.method + ", " + shown.rule.map(rule_title)
    return shown.assign(row=rows, column=shown.metric + ", " + shown.form)


def _paper(row: Any) -> float | None:
    known = (row.metric, row.form) == ("mean drop", "accuracy")
    return paper_value("merge-rules", f"{row.method}, {rule_title(row.rule)}", "Mean drop") if known else None
