"""The adapters of all domains merged: before, after, and their difference, as in Tables 2 and 13 of the paper."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import pandas as pd
from pydantic import Field

from hiplora.metrics import MergeInstance, pass_at_k
from hiplora.study.protocols.settings import Done, Findings, OfMethods, Rules, Run, Study
from hiplora.study.protocols.single_task import drift_table
from hiplora.study.records import Tables, by_form, joined, measured, scored, table, tidy, with_differences
from hiplora.study.statistics import averaged, drift, replicates, summary

Drawn = list[tuple[int, MergeInstance]]  # (seed of the draw, merge)
_TITLES = {"ties": "TIES", "dare": "DARE", "knots": "KnOTS", "tsv": "TSV", "iso-c": "Iso-C"}


class Merging(OfMethods):
    """The adapters of all domains merged: scores before, after, and their difference."""

    whole: ClassVar[tuple[str, ...]] = ("rule", "method")
    rules: Rules = Field(default={"addition": {}}, description="Merge rule → its options, as of `hiplora merge`.")

    def runs(self, study: Study) -> list[Run]:
        """Merge the adapters of each seed by every rule; score each merge, and each adapter, on the domains' tasks."""
        return merge_runs(study, self.rules, map(study.row, self.methods), self.drawn(study))

    def drawn(self, study: Study) -> Drawn:
        """Return the merges: those of all domains for each seed."""
        return of_all(study.recipe.domains, study.seeds(self))

    def tables(self, study: Study, done: Done) -> Findings:
        """Return before, after and difference by rule in both forms, the mean drop of all rules, and drift."""
        records = tidy(done)
        moved, numbers = drift(records[records.when == "after"], ["rule"]), _measured(study, records)
        findings = Findings(joined(numbers, moved))
        rows, drops = _before_and_after(numbers), numbers[numbers.metric.isin(("mean drop", "mean signed drop"))]
        for rule in self.rules:
            caption = f"Merged by {rule_title(rule)}, %"
            findings.tables |= by_form(caption, rows[rows.rule == rule], "row", stem=rule)
        findings.tables |= drift_tables(self.rules, moved)
        drops = drops.assign(row=titled(drops), column=drops.metric + ", " + drops.form)
        rules = table(drops, "row", paper="merge-rules")
        findings.tables["rules"] = "Mean drop by rule, percentage points", rules
        findings.text = (
            "Before: each domain by its own adapter; after: all of them by the merge of the adapters of one seed, mean "
            "over the seeds. Mean drop: mean absolute difference over metrics and seeds; signed drop: a gain is "
            "negative."
        )
        return findings


def rule_title(rule: str) -> str:
    """Return a merge rule's name as tables have it."""
    return _TITLES.get(rule, rule)


def titled(numbers: pd.DataFrame) -> pd.Series:
    """Return the titles of the rows of a table of methods and rules."""
    return numbers.method + ", " + numbers.rule.map(rule_title)


def of_all(domains: Iterable[str], seeds: Iterable[int]) -> Drawn:
    """Return the merges of some domains' adapters, one for each seed."""
    return [(seed, tuple((domain, seed) for domain in domains)) for seed in seeds]


def merge_runs(
    study: Study, rules: Mapping[str, Any], rows: Iterable[Any], drawn: Drawn, drift: bool = False, like: Any = None
) -> list[Run]:
    """Return the jobs that judging merges reads, by rule and method: each adapter alone `before`, the merges `after`.

    A merge is scored on its adapters' own tasks. The drift of a merge of all domains of one seed, which several
    protocols read, is always measured. The label `merge` is the place in `drawn`.
    """
    runs, domains = [], study.recipe.domains
    for (rule, options), row in itertools.product(rules.items(), list(rows)):
        label, adapters = {"rule": rule, "method": row.title}, {}
        for domain, seed in dict.fromkeys(adapter for _, merge in drawn for adapter in merge):
            adapters[domain, seed] = study.adapter(row, domain, seed, like=like)
            alone = study.score(adapters[domain, seed])
            runs.append((alone, {**label, "seed": seed, "when": "before", "domain": domain}))
        for index, (draw, merge) in enumerate(drawn):
            of_all_domains = len(merge) == len(domains) and len({seed for _, seed in merge}) == 1
            tasks = {domains[name].task: domains[name].tasks[domains[name].task] for name, _ in merge}
            settings = {**study.scoring(tasks, drift or of_all_domains), "rule": rule, "options": dict(options)}
            name = f"merge by {rule}: {row.title}, {' + '.join(f'{domain} {seed}' for domain, seed in merge)}"
            job = study.job("merge", name, settings, **{domain: adapters[domain, seed] for domain, seed in merge})
            runs.append((job, {**label, "seed": draw, "when": "after", "merge": index}))
    return runs


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
    """The items that are reported: each domain's score in both forms, and pass@k where programs are sampled.

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
