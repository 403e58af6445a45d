"""How many merges fail, over their size, the rule and the threshold τ: MergeFail, as in appendix C.3 of the paper."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import pandas as pd
from pydantic import Field

from hiplora.metrics import falls_below
from hiplora.reporting import plots
from hiplora.study.protocols.merging import merge_of, rule_title
from hiplora.study.protocols.settings import OfMethods, Positive, Rules, Share
from hiplora.study.protocols.single_task import drift_table
from hiplora.study.records import Findings, joined, measured, paper_value, scored, table, tidy, with_jobs
from hiplora.study.statistics import averaged, differences, drift, hierarchical, replicates, summary

if TYPE_CHECKING:
    from hiplora.metrics import MergeInstance
    from hiplora.study.builder import Study
    from hiplora.study.jobs import Job
    from hiplora.study.store import Results

PROJECT_TAUS = [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0]


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
    taus: list[Share] = Field(default=PROJECT_TAUS, min_length=1, description="Thresholds.")
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
    found = Findings(settings.name, settings.title)
    taus = [settings.tau, *(tau for tau in sorted(settings.taus) if tau != settings.tau)]
    drawn, seeds = instances(study, settings), len(study.seeds(settings))
    parts = [
        failures(study, rows, drawn, taus).assign(rule=rule, seeds=seeds)
        for rule, rows in records.groupby("rule", sort=False)
    ]
    moved = (
        drift(records[records["merge"] != ""], ["rule"], shared=True) if settings.drift else pd.DataFrame()
    )
    numbers = joined(*parts, columns=["metric", "form", "rule", "method", "tau", "estimate", "size"])
    different = {str(size): count for size, count in different_merges(study, settings).items()}
    numbers["merges"] = numbers["size"].map(different).fillna(sum(different.values()))
    found.measured = with_jobs(joined(numbers, moved), runs, ("rule", "method"))
    fails = numbers[numbers.metric == "merge fail"]
    fails = fails.assign(row=fails.method + ", " + fails.rule.map(rule_title))
    for form in ("accuracy", "likelihood"):
        rows = fails[fails.form == form]
        sizes = rows[rows.tau == settings.tau]
        sizes = sizes.assign(
            column=[f"{n} adapters ({different[n]})" if n != "all" else "All" for n in sizes["size"]]
        )
        caption = f"MergeFail at τ = {settings.tau:g}: {form}, % of merges (different ones)"
        found.tables[f"{settings.name}-{form}"] = caption, table(sizes, "column", "row", paper=_paper)
        taus = rows[rows["size"] == "all"].sort_values("tau", kind="stable")
        taus = taus.assign(column=[f"τ = {tau:g}" for tau in taus.tau])
        wide = table(taus, "column", "row").reindex(rows.row.unique())
        found.tables[f"{settings.name}-thresholds-{form}"] = f"MergeFail over the threshold: {form}, %", wide
        if form == "likelihood" and not taus.empty:
            figure = plots.facets(
                taus, "rule", plots.lines, x="tau", y="estimate", line="method", low="low", high="high",
                xlabel="threshold τ", ylabel="MergeFail by likelihood (%)",
            )  # fmt: skip
            found.figures[f"{settings.name}-thresholds"] = "How many merges fail, over the threshold", figure
    for rule in settings.rules if not moved.empty else ():
        caption = f"Drift of the models merged by {rule_title(rule)}"
        found.tables[f"{settings.name}-drift-{rule}"] = drift_table(moved[moved.rule == rule], caption)
    found.text = (
        "A merge fails if some task keeps less than τ of the score of its adapter alone; a task whose score alone is 0 "
        "cannot fail. Intervals: 95 % over items; the paper's, over draws and merges, are in measurements.csv as "
        "hierarchical_low and _high. Where none of n merges failed, a share up to 3/n is compatible with that."
    )
    return found


def instances(study: Study, settings: MergeFail) -> list[tuple[int, MergeInstance]]:
    """Return the drawn merges, equally many for each seed: (seed, merge); two seeds may draw the same."""
    from hiplora.metrics import merge_instances

    domains, seeds = list(study.recipe.domains), study.seeds(settings)
    return [
        (seed, instance)
        for seed in seeds
        for found in merge_instances(
            domains, settings.sizes, seeds, settings.instances, settings.seed + seed
        ).values()
        for instance in found
    ]


def different_merges(study: Study, settings: MergeFail) -> Counter[int]:
    """Return size → how many different merges were drawn."""
    return Counter(len(merge) for merge in {merge for _, merge in instances(study, settings)})


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
    own = [alone[:1] == (domains.get(task),) for alone, task in zip(items.alone, items.task, strict=True)]
    after = replicates(items[items["merge"] != ""], ["form", "method", "seed", "merge", "task"])
    if after.empty:
        return pd.DataFrame()
    members = after.index.to_frame(index=False)
    members["alone"] = [
        (domains[task], dict(drawn[merge][1])[domains[task]])
        for task, merge in zip(members.task, members["merge"], strict=True)
    ]
    single = replicates(items[own], ["form", "method", "alone"])
    before = single.reindex(pd.MultiIndex.from_frame(members[["form", "method", "alone"]]))
    sizes = [str(len(drawn[merge][1])) for merge in members["merge"]]
    index = pd.MultiIndex.from_frame(members[["form", "method", "seed", "merge"]].assign(size=sizes))
    return pd.concat(
        [_at(tau, before.to_numpy(), pd.DataFrame(after.to_numpy(), index), shared) for tau in taus],
        ignore_index=True,
    )


def _at(tau: float, before: Any, after: pd.DataFrame, shared: bool) -> pd.DataFrame:
    """MergeFail at one threshold."""
    below = pd.DataFrame(falls_below(after.to_numpy(), before, tau), after.index)
    failed = 100.0 * below.groupby(level=after.index.names, sort=False).any()
    apart = differences(failed, first=True)
    among = ["merge", "seed"] if shared else ["merge"]
    wide, wide_apart = (
        hierarchical(
            one[0].rename("value").reset_index(),
            [n for n in one.index.names if n not in ("seed", "merge", "size")],
        )
        for one in (failed, apart)
    )
    whole = summary(averaged(failed, [*among, "size"])).join(wide)
    parts = [
        measured(whole, "merge fail", "%", size="all"),
        measured(summary(averaged(failed, among)), "merge fail", "%"),
        measured(
            summary(averaged(apart, [*among, "size"])).join(wide_apart),
            "merge fail difference",
            "pp",
            size="all",
        ),
    ]
    return pd.concat(parts, ignore_index=True).assign(tau=tau)


def _paper(row: Any) -> float | None:
    if row.form != "accuracy" or row.size != "all":
        return None
    return paper_value("merge-rules", f"{row.method}, {rule_title(row.rule)}", "MergeFail")
