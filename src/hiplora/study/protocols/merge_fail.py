"""How many merges fail, over their size, the rule and the threshold τ: MergeFail, as in appendix C.3 of the paper."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar

import pandas as pd
from pydantic import Field

from hiplora.metrics import DEFAULT_TAUS, MergeInstance, falls_below, merge_instances
from hiplora.study.jobs import Job
from hiplora.study.protocols.merging import drift_tables, merge_of, titled
from hiplora.study.protocols.settings import Findings, OfMethods, Positive, Results, Rules, Run, Share, Study
from hiplora.study.records import by_form, joined, measured, scored, tidy
from hiplora.study.statistics import differences, drift, hierarchical, opened

Drawn = list[tuple[int, MergeInstance]]  # (seed of the draw, merge)


class MergeFail(OfMethods):
    """Merges of several adapters drawn from all seeds: how many fail, over the threshold τ."""

    name: ClassVar[str] = "merge-fail"
    title: ClassVar[str] = "Merges that fail"
    by: ClassVar[tuple[str, ...]] = ("rule", "method")
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

    def runs(self, study: Study) -> list[Run]:
        """Merge the drawn tuples of every method by every rule; score each on its own tasks, and its adapters."""
        drawn = self._drawn(study)
        found: list[Run] = []
        for rule, options in self.rules.items():
            for row in map(study.row, self.methods):
                merges = [merge_of(study, row, merge, rule, options, self.drift) for _, merge in drawn]
                found += labelled(study, row, rule, drawn, merges)
        return found

    def tables(self, study: Study, results: Results, runs: Sequence[Run]) -> Findings:
        """Return MergeFail over sizes and thresholds in both forms, differences between methods, and drift."""
        records, drawn = tidy(results, runs, self.by), self._drawn(study)
        taus = list(dict.fromkeys([self.tau, *self.taus]))
        rules = records.groupby("rule", sort=False)
        parts = [failures(study, rows, drawn, taus).assign(rule=rule) for rule, rows in rules]
        fails = joined(*parts, columns=["metric", "form", "rule", "method", "tau", "estimate", "size", "merges"])
        moved = drift(records[records["merge"] != ""] if self.drift else records[:0], ["rule"], shared=True)
        found = Findings(joined(fails, moved))
        shown = fails[fails.metric == "merge fail"].assign(row=titled)
        sizes = shown[shown.tau == self.tau]
        headings = sizes["size"] + " adapters (" + sizes["merges"].map("{:.0f}".format) + ")"
        sizes = sizes.assign(column=headings.where(sizes["size"] != "all", "MergeFail, all"))
        caption = f"MergeFail at τ = {self.tau:g}, % of merges (different ones)"
        found.tables = by_form(self.name, caption, sizes, "row", "merge-rules")
        over = shown[shown["size"] == "all"].sort_values("tau", kind="stable")
        over = over.assign(column=[f"τ = {tau:g}" for tau in over.tau])
        found.tables |= by_form(f"{self.name}-thresholds", "MergeFail over the threshold, %", over, "row")
        found.tables |= drift_tables(self.name, self.rules, moved)
        found.text = (
            "A merge fails if some task keeps less than τ of the score of its adapter alone; a task whose score alone "
            "is 0 cannot fail. Intervals: 95 % over draws and merges; where all of n different merges agree, the exact "
            "one: of 72 that held, up to 5 % may fail."
        )
        return found

    def _drawn(self, study: Study) -> Drawn:
        """The merges, equally many for each seed; two seeds may draw the same."""
        seeds = study.seeds(self)
        draws = {
            seed: merge_instances(list(study.recipe.domains), self.sizes, seeds, self.instances, self.seed + seed)
            for seed in seeds
        }
        return [(seed, merge) for seed, sizes in draws.items() for merges in sizes.values() for merge in merges]


def labelled(
    study: Study, row: Any, rule: str, drawn: Drawn, merges: Sequence[Job], like: Any = None
) -> Iterator[Run]:
    """Yield the jobs that judging a method's merges reads, with labels: the adapters' own scores, and the merges."""
    label = {"rule": rule, "method": row.title}
    for domain, seed in dict.fromkeys(one for _, merge in drawn for one in merge):
        alone = study.score(study.adapter(row, domain, seed, like=like))
        yield alone, {**label, "alone": domain, "trained": seed}
    for place, ((seed, _), job) in enumerate(zip(drawn, merges, strict=True)):
        yield job, {**label, "seed": seed, "merge": place}


def failures(study: Study, records: pd.DataFrame, drawn: Drawn, taus: Sequence[float]) -> pd.DataFrame:
    """Return the MergeFail of one rule in per cent by size and threshold, and the differences to the first method."""
    domains = {domain.task: name for name, domain in study.recipe.domains.items()}
    items = scored(records).assign(alone_on=lambda one: one.task.map(domains))
    merged = items[items["merge"] != ""]
    if merged.empty:
        return pd.DataFrame()
    by = ["form", "method", "seed", "merge"]
    pairs = merged.groupby([*by, "alone_on"], sort=False)["value"].mean().rename("after").reset_index()
    pairs["size"] = [str(len(drawn[merge][1])) for merge in pairs["merge"]]
    trained = [dict(drawn[merge][1])[domain] for merge, domain in zip(pairs["merge"], pairs.alone_on, strict=True)]
    pairs["trained"] = pd.Series(trained, dtype=object)
    own = items[items.alone == items.alone_on]
    own = own.groupby(["form", "method", "alone_on", "trained"], sort=False)["value"].mean().rename("before")
    pairs = pairs.join(own, on=["form", "method", "alone_on", "trained"])
    different = Counter(str(len(merge)) for merge in {merge for _, merge in drawn})
    different["all"] = different.total()
    parts = []
    for tau in taus:
        pairs["value"] = 100.0 * falls_below(pairs.after, pairs.before, tau)
        failed = pairs.groupby([*by, "size"], sort=False)["value"].max()
        apart = differences(failed.to_frame(0), first=True)[0].rename("value").reset_index()
        failed = failed.reset_index()
        for metric, rows, groups, unit in (
            ("merge fail", failed, ["form", "method"], "%"),
            ("merge fail", failed, ["form", "method", "size"], "%"),
            ("merge fail difference", apart, ["form", "method", "minus"], "pp"),
        ):
            if len(rows):
                parts.append(measured(hierarchical(rows, groups), metric, unit, tau=tau))
    found = joined(*parts).fillna({"size": "all"})
    found["merges"] = found["size"].map(different)
    return opened(found, found.merges)
