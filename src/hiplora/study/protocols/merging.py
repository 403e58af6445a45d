"""The adapters of all domains merged: before, after, and their difference, as in Tables 2 and 13 of the paper."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
from pydantic import Field

from hiplora.study.protocols.settings import OfMethods, Positive, Rules
from hiplora.study.protocols.single_task import drift_table
from hiplora.study.records import Findings, joined, measured, paper_value, scored, table, tidy, with_jobs
from hiplora.study.statistics import averaged, differences, drift, replicates, summary

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
    rules: Rules = Field(
        default={"addition": {}}, description="Merge rule → its options, as of `hiplora merge`."
    )
    passing: dict[str, Positive | None] = Field(
        default={}, description="Further tasks, scored for the adapter of the domain that has such a task."
    )


@dataclass(frozen=True)
class Reported:
    """A metric that is reported of a domain: a task's score, or pass@k of it; `further`: not one of its own tasks."""

    title: str
    domain: str
    task: str
    k: int = 1
    further: bool = False

    def of(self, records: pd.DataFrame) -> pd.DataFrame:
        """Return its items. A task's score is pass@1, the share of n samples that pass: pass@k follows from it."""
        from hiplora.evaluation.suite import task_samples
        from hiplora.metrics import pass_at_k

        rows = records[(records.task == self.task) & records.domain.isin((self.domain, ""))]
        if self.k > 1 or self.further:
            rows = rows[rows.form == "accuracy"]
        if self.k > 1:
            samples = task_samples(self.task)
            values = [100 * pass_at_k(samples, round(score * samples / 100), self.k) for score in rows.value]
            rows = rows.assign(value=values)
        return rows.assign(reported=self.title, domain=self.domain)


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
    found = Findings(settings.name, settings.title)
    merged = records[records.when == "after"]
    moved = with_jobs(drift(merged, ["rule"]), runs, ("rule", "method"))
    found.measured = joined(with_jobs(_measured(study, settings, records), runs, ("rule", "method")), moved)
    for rule in settings.rules:
        for form in ("accuracy", "likelihood"):
            rows = found.measured[(found.measured.rule == rule) & (found.measured.form == form)]
            caption = f"Merged by {rule_title(rule)}: {form}, %"
            found.tables[f"{settings.name}-{rule}-{form}"] = caption, _before_and_after(rows)
        if not moved.empty:
            caption = f"Drift of the models merged by {rule_title(rule)}"
            found.tables[f"{settings.name}-drift-{rule}"] = drift_table(moved[moved.rule == rule], caption)
    found.tables[f"{settings.name}-rules"] = "Mean drop by rule, percentage points", _by_rule(found.measured)
    found.text = (
        "Before: each domain by its own adapter; after: all of them by the merge of the adapters of one seed, mean "
        "over the seeds. Mean drop: mean absolute difference over metrics and seeds; signed drop: a gain is "
        "negative."
    )
    return found


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


def reported(study: Study, settings: Merging) -> list[Reported]:
    """Return the metrics to report: each domain's score, and pass@k where programs are sampled."""
    from hiplora.evaluation.suite import task_samples

    found = []
    for name, domain in study.recipe.domains.items():
        found.append(Reported(domain.title, name, domain.task))
        asked = {domain.task: PASSES[1:], **dict.fromkeys(passing(study, settings, name), PASSES)}
        for task, passes in asked.items():
            for k in passes:
                if k <= task_samples(task):
                    found.append(Reported(f"{domain.title} pass@{k}", name, task, k, task != domain.task))
    return found


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


def _measured(study: Study, settings: Merging, records: pd.DataFrame) -> pd.DataFrame:
    items = scored(records)
    rows = pd.concat([metric.of(items) for metric in reported(study, settings)], ignore_index=True)
    draws = replicates(rows, ["rule", "form", "when", "method", "domain", "reported", "seed"])
    if draws.empty:
        return pd.DataFrame(columns=["rule", "form", "metric", "method", "estimate"])
    before, after = (draws.xs(when, level="when") for when in ("before", "after"))
    change = before - after
    drop, signed, alone = (averaged(one, ["domain", "reported"]) for one in (change.abs(), change, before))
    return pd.concat(
        [
            measured(summary(draws), "merge score", "%"),
            measured(summary(change), "drop", "pp"),
            measured(summary(drop), "mean drop", "pp"),
            measured(summary(signed), "mean signed drop", "pp"),
            measured(summary(alone), "score alone", "%"),
            measured(summary(differences(alone)), "score alone difference", "pp"),
            measured(summary(differences(drop)), "mean drop difference", "pp"),
        ],
        ignore_index=True,
    )


def _paper(row: Any) -> float | None:
    if row.metric != "mean drop" or row.form != "accuracy":
        return None
    return paper_value("merge-rules", f"{row.method}, {rule_title(row.rule)}", "Mean drop")


def _before_and_after(rows: pd.DataFrame) -> pd.DataFrame:
    shown = rows[rows.metric.isin(("merge score", "drop", "mean drop"))]
    when = np.where(shown.metric == "merge score", shown.when, "drop")
    shown = shown.assign(row=shown.method + ", " + when, column=shown.reported.fillna("Mean drop"))
    order = [f"{method}, {when}" for method in shown.method.unique() for when in ("before", "after", "drop")]
    return table(shown, "column", "row", paper=_paper).reindex(order)


def _by_rule(numbers: pd.DataFrame) -> pd.DataFrame:
    shown = numbers[numbers.metric.isin(("mean drop", "mean signed drop"))]
    rows = shown.method + ", " + shown.rule.map(rule_title)
    return table(
        shown.assign(row=rows, column=shown.metric + ", " + shown.form), "column", "row", paper=_paper
    )
