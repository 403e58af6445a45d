"""The adapters of all domains merged: before, after, and their difference, as in Tables 2 and 13 of the paper."""

import itertools
from collections.abc import Mapping
from typing import Any, ClassVar

import pandas as pd
from pydantic import Field

from hiplora.metrics import MergeInstance, pass_at_k
from hiplora.study.jobs import Job
from hiplora.study.protocols.settings import Done, Findings, OfMethods, Rules, Run, Study
from hiplora.study.protocols.single_task import drift_table
from hiplora.study.records import Tables, by_form, joined, measured, scored, table, tidy, with_differences
from hiplora.study.statistics import averaged, drift, replicates, summary

_TITLES = {"ties": "TIES", "dare": "DARE", "knots": "KnOTS", "tsv": "TSV", "iso-c": "Iso-C"}


class Merging(OfMethods):
    """The adapters of all domains merged: scores before, after, and their difference."""

    whole: ClassVar[tuple[str, ...]] = ("rule", "method")
    rules: Rules = Field(default={"addition": {}}, description="Merge rule → its options, as of `hiplora merge`.")

    def runs(self, study: Study) -> list[Run]:
        """Merge the adapters of each seed by every rule; score each merge, and each adapter, on the domains' tasks."""
        found = []
        for rule, method, seed in itertools.product(self.rules, self.methods, study.seeds(self)):
            row, label = study.row(method), {"rule": rule, "method": study.row(method).title, "seed": seed}
            for domain in study.recipe.domains:
                alone = study.score(study.adapter(row, domain, seed))
                found.append((alone, {**label, "when": "before", "domain": domain}))
            instance = tuple((domain, seed) for domain in study.recipe.domains)
            found.append((merge_of(study, row, instance, rule, self.rules[rule]), {**label, "when": "after"}))
        return found

    def tables(self, study: Study, done: Done) -> Findings:
        """Return before, after and difference by rule in both forms, the mean drop of all rules, and drift."""
        records = tidy(done)
        moved, numbers = drift(records[records.when == "after"], ["rule"]), _measured(study, records)
        found = Findings(joined(numbers, moved))
        rows, drops = _before_and_after(numbers), numbers[numbers.metric.isin(("mean drop", "mean signed drop"))]
        for rule in self.rules:
            caption = f"Merged by {rule_title(rule)}, %"
            found.tables |= by_form(caption, rows[rows.rule == rule], "row", stem=rule)
        found.tables |= drift_tables(self.rules, moved)
        drops = drops.assign(row=titled(drops), column=drops.metric + ", " + drops.form)
        rules = table(drops, "row", paper="merge-rules")
        found.tables["rules"] = "Mean drop by rule, percentage points", rules
        found.text = (
            "Before: each domain by its own adapter; after: all of them by the merge of the adapters of one seed, mean "
            "over the seeds. Mean drop: mean absolute difference over metrics and seeds; signed drop: a gain is "
            "negative."
        )
        return found


def rule_title(rule: str) -> str:
    """Return a merge rule's name as tables have it."""
    return _TITLES.get(rule, rule)


def titled(numbers: pd.DataFrame) -> pd.Series:
    """Return the titles of the rows of a table of methods and rules."""
    return numbers.method + ", " + numbers.rule.map(rule_title)


def merge_of(
    study: Study, row: Any, instance: MergeInstance, rule: str, options: Mapping[str, Any], drift: bool = False,
    like: Any = None,
) -> Job:  # fmt: skip
    """Return the job that merges a method's adapters of some domains and seeds, scored on their own tasks.

    The merge of all domains of one seed, which several protocols read, always has its drift measured.
    """
    adapters = {domain: study.adapter(row, domain, seed, like=like) for domain, seed in instance}
    whole = len(adapters) == len(study.recipe.domains) and len({seed for _, seed in instance}) == 1
    domains = [study.recipe.domains[name] for name in adapters]
    settings = study.scoring({one.task: one.tasks[one.task] for one in domains}, drift or whole)
    settings |= {"rule": rule, "options": dict(options)}
    told = " + ".join(f"{domain} {seed}" for domain, seed in instance)
    return study.job("merge", f"merge by {rule}: {row.title}, {told}", settings, **adapters)


def drift_tables(rules: Mapping[str, Any], moved: pd.DataFrame) -> Tables:
    """Return the drift of the merged models, a table a rule."""
    titles = {rule: f"Drift of the models merged by {rule_title(rule)}" for rule in (rules if len(moved) else ())}
    return {f"drift-{rule}": drift_table(moved[moved.rule == rule], title) for rule, title in titles.items()}


def _measured(study: Study, records: pd.DataFrame) -> pd.DataFrame:
    by = ["rule", "form", "when", "method", "domain", "reported", "seed"]
    draws = replicates(_reported(study, scored(records, study.tasks)), by)
    before, after = (draws.xs(when, level="when") for when in ("before", "after"))
    change, over = before - after, ["domain", "reported"]
    return joined(
        measured(summary(draws), "merge score", "%"),
        measured(summary(change), "drop", "pp"),
        with_differences(averaged(change.abs(), over), "mean drop"),
        measured(summary(averaged(change, over)), "mean signed drop", "pp"),
        with_differences(averaged(before, over), "score alone", "%"),
    )


def _reported(study: Study, items: pd.DataFrame) -> pd.DataFrame:
    """The items of what is reported: each domain's score in both forms, and pass@k where programs are sampled.

    A task's accuracy is pass@1, the share of its n samples that pass: pass@k follows from it.
    """
    from hiplora.evaluation.suite import task_samples

    parts, items = [], items[(items.domain == "") | (items.domain == items.on)]  # after a merge, or its own before
    for name in study.recipe.domains:
        own = items[items.on == name].assign(domain=name)
        title = study.recipe.domains[name].title
        parts.append(own.assign(reported=title))
        passed, n = own[own.form == "accuracy"], task_samples(study.recipe.domains[name].task)
        for k in (5, 10):
            if k <= n:
                values = [100 * pass_at_k(n, round(share * n / 100), k) for share in passed.value]
                parts.append(passed.assign(value=values, reported=f"{title} pass@{k}"))
    return pd.concat(parts, ignore_index=True)


def _before_and_after(numbers: pd.DataFrame) -> pd.DataFrame:
    """The measurements of a table before and after a merge, for each method the row before, after and drop."""
    shown = numbers[numbers.metric.isin(("merge score", "drop", "mean drop"))]
    when = shown.when.where(shown.metric == "merge score", "drop")
    shown = shown.assign(row=shown.method + ", " + when, column=shown.reported.fillna("Mean drop"))
    order = [f"{method}, {when}" for method in shown.method.unique() for when in ("before", "after", "drop")]
    return shown.sort_values("row", key=lambda rows: rows.map(order.index), kind="stable")
