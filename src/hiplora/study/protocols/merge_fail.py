"""How many merges fail, over their size, the rule and the threshold τ: MergeFail, as in appendix C.3 of the paper."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import pandas as pd
from pydantic import Field

from hiplora.metrics import DEFAULT_TAUS, falls_below
from hiplora.study.protocols.merging import drift_tables, merge_of, rule_title
from hiplora.study.protocols.settings import OfMethods, Positive, Rules, Share
from hiplora.study.records import Findings, by_form, joined, measured, paper_value, scored, tidy, with_jobs
from hiplora.study.statistics import averaged, differences, drift, hierarchical, replicates, summary

if TYPE_CHECKING:
    from hiplora.metrics import MergeInstance
    from hiplora.study.builder import Study
    from hiplora.study.jobs import Job
    from hiplora.study.store import Results


class MergeFail(OfMethods):
    """Merges of several adapters drawn from all seeds: how many fail, over the threshold τ."""

    name: ClassVar[str] = "merge-fail"
    title: ClassVar[str] = "Merges that fail"
    rules: Rules = Field(default={"addition": {}}, description="Merge rule → its options.")
    sizes: list[Annotated[int, Field(ge=2)]] = Field(
        default=[2, 3, 4], min_length=1, description="How many adapters are merged."
    )
    instances: Positive = Field(
        default=20, description="Merges of each size drawn for each seed; all, where there are fewer."
    )
    taus: list[Share] = Field(default=list(DEFAULT_TAUS), min_length=1, description="Thresholds.")
    tau: Share = Field(default=0.9, description="The one that is reported first.")
    seed: int = Field(default=0, ge=0, description="Draws the merges, the same for all methods.")
    drift: bool = Field(default=False, description="Measure the drift of every merged model too.")


def jobs(study: Study, settings: MergeFail) -> list[Job]:
    """Merge the drawn tuples of every method by every rule; score each on its own tasks, and its adapters."""
    return [job for job, _ in _runs(study, settings)]


def tables(study: Study, settings: MergeFail, results: Results) -> Findings:
    """Return MergeFail over sizes and thresholds in both forms, differences between methods, and drift."""
    runs = list(_runs(study, settings))
    records = tidy(results, runs, ("rule", "method"))
    drawn, seeds = instances(study, settings), len(study.seeds(settings))
    taus = list(dict.fromkeys([settings.tau, *settings.taus]))
    parts = [
        failures(study, rows, drawn, taus).assign(rule=rule, seeds=seeds)
        for rule, rows in records.groupby("rule", sort=False)
    ]
    fails = joined(*parts, columns=["metric", "form", "rule", "method", "tau", "estimate", "size"])
    different = Counter(str(len(merge)) for merge in {merge for _, merge in drawn})
    fails["merges"] = fails["size"].map({**different, "all": different.total()})
    moved = drift(records[records["merge"] != ""] if settings.drift else records[:0], ["rule"], shared=True)
    numbers = with_jobs(joined(fails, moved), runs, ("rule", "method"))
    found = Findings(settings.name, settings.title, numbers)
    shown = fails[fails.metric == "merge fail"]
    shown = shown.assign(row=shown.method + ", " + shown.rule.map(rule_title))
    headings = {"all": "All", **{size: f"{size} adapters ({count})" for size, count in different.items()}}
    sizes = shown[shown.tau == settings.tau].assign(column=lambda rows: rows["size"].map(headings))
    caption = f"MergeFail at τ = {settings.tau:g}, % of merges (different ones)"
    found.tables = by_form(settings.name, caption, sizes, "row", _paper)
    over = shown[shown["size"] == "all"].sort_values("tau", kind="stable")
    over = over.assign(column=[f"τ = {tau:g}" for tau in over.tau])
    found.tables |= by_form(f"{settings.name}-thresholds", "MergeFail over the threshold, %", over, "row")
    found.tables |= drift_tables(settings.name, settings.rules, moved)
    found.text = (
        "A merge fails if some task keeps less than τ of the score of its adapter alone; a task whose score alone is 0 "
        "cannot fail. Intervals: 95 % over items; the paper's, over draws and merges, are in measurements.csv as "
        "hierarchical_low and _high. Where none of n merges failed, a share up to 3/n is compatible with that."
    )
    return found


def instances(study: Study, settings: MergeFail) -> list[tuple[int, MergeInstance]]:
    """Return the drawn merges, equally many for each seed: (seed, merge); two seeds may draw the same."""
    from hiplora.metrics import merge_instances

    domains, seeds, found = list(study.recipe.domains), study.seeds(settings), []
    for seed in seeds:
        drawn = merge_instances(domains, settings.sizes, seeds, settings.instances, settings.seed + seed)
        found += [(seed, instance) for merges in drawn.values() for instance in merges]
    return found


def _runs(study: Study, settings: MergeFail) -> Iterator[tuple[Job, dict]]:
    drawn = instances(study, settings)
    for rule, options in settings.rules.items():
        for method in settings.methods:
            row = study.row(method)
            merges = [merge_of(study, row, merge, rule, options, settings.drift) for _, merge in drawn]
            yield from labelled(study, row, rule, drawn, merges)


def labelled(
    study: Study,
    row: Any,
    rule: str,
    drawn: list[tuple[int, MergeInstance]],
    merges: list[Job],
    like: Any = None,
) -> Iterator[tuple[Job, dict]]:
    """Yield the jobs that judging a method's merges reads, with labels: the adapters' own scores, and the merges."""
    label = {"rule": rule, "method": row.title}
    for domain, seed in dict.fromkeys(one for _, merge in drawn for one in merge):
        alone = study.score(study.adapter(row, domain, seed, like=like))
        yield alone, {**label, "alone": (domain, seed)}
    for place, ((seed, _), job) in enumerate(zip(drawn, merges, strict=True)):
        yield job, {**label, "seed": seed, "merge": place}


def failures(
    study: Study,
    records: pd.DataFrame,
    drawn: list[tuple[int, MergeInstance]],
    taus: list[float],
    shared: bool = True,
) -> pd.DataFrame:
    """Return the MergeFail of one rule in per cent by size and threshold, and the differences to the first method.

    Of adapters that merges share there is no spread over seeds.
    """
    domains = {domain.task: name for name, domain in study.recipe.domains.items()}
    items = scored(records)
    after = replicates(items[items["merge"] != ""], ["form", "method", "seed", "merge", "task"])
    if after.empty:
        return pd.DataFrame()
    own = [alone[:1] == (domains.get(task),) for alone, task in zip(items.alone, items.task, strict=True)]
    members = after.index.to_frame(index=False)
    members["size"] = [str(len(drawn[merge][1])) for merge in members["merge"]]
    members["alone"] = [
        (domains[task], dict(drawn[merge][1])[domains[task]])
        for task, merge in zip(members.task, members["merge"], strict=True)
    ]
    before = replicates(items[own], ["form", "method", "alone"])
    before = before.reindex(pd.MultiIndex.from_frame(members[["form", "method", "alone"]]))
    index = pd.MultiIndex.from_frame(members[["form", "method", "seed", "merge", "size"]])
    among = ["merge", "seed"] if shared else ["merge"]
    parts = []
    for tau in taus:
        below = pd.DataFrame(falls_below(after.to_numpy(), before.to_numpy(), tau), index)
        failed = 100.0 * below.groupby(level=index.names, sort=False).any()
        whole = {
            "merge fail": (failed, "%"),
            "merge fail difference": (differences(failed, first=True), "pp"),
        }
        for metric, (draws, unit) in whole.items():
            by = [name for name in draws.index.names if name not in ("seed", "merge", "size")]
            wide = hierarchical(draws[0].rename("value").reset_index(), by)
            mean = summary(averaged(draws, [*among, "size"])).join(wide)
            parts.append(measured(mean, metric, unit, size="all", tau=tau))
        parts.append(measured(summary(averaged(failed, among)), "merge fail", "%", tau=tau))
    return pd.concat(parts, ignore_index=True)


def _paper(row: Any) -> float | None:
    return paper_value("merge-rules", row.row, "MergeFail") if row.column == "All" else None
