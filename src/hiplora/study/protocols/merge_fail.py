"""How many merges fail, over their size, the rule and the threshold τ: MergeFail, as in appendix C.3 of the paper."""

from collections import Counter
from collections.abc import Sequence
from typing import Annotated

import pandas as pd
from pydantic import Field

from hiplora.metrics import DEFAULT_TAU, DEFAULT_TAUS, falls_below, merge_instances
from hiplora.study.protocols.merging import Drawn, Merging, drift_tables, merge_runs, titled
from hiplora.study.protocols.settings import Done, Findings, Positive, Run, Share, Study
from hiplora.study.records import by_form, joined, measured, scored, tidy
from hiplora.study.statistics import differences, drift, hierarchical, opened

Size = Annotated[int, Field(ge=2)]


class MergeFail(Merging):
    """Merges of several adapters drawn from all seeds: how many fail, over the threshold τ."""

    sizes: list[Size] = Field(default=[2, 3, 4], min_length=1, description="How many adapters are merged.")
    instances: Positive = Field(default=20, description="Merges of each size drawn for each seed, or all there are.")
    taus: list[Share] = Field(default=list(DEFAULT_TAUS), min_length=1, description="Thresholds.")
    tau: Share = Field(default=DEFAULT_TAU, description="The one that is reported first.")
    seed: int = Field(default=0, ge=0, description="Draws the merges, the same for all methods.")
    drift: bool = Field(default=False, description="Measure the drift of every merged model too.")

    def runs(self, study: Study) -> list[Run]:
        """Merge the drawn tuples of every method by every rule; score each on its own tasks, and its adapters."""
        return merge_runs(study, self.rules, map(study.row, self.methods), self.drawn(study), self.drift)

    def tables(self, study: Study, done: Done) -> Findings:
        """Return MergeFail over sizes and thresholds in both forms, differences between methods, and drift."""
        records, taus = tidy(done), list(dict.fromkeys([self.tau, *self.taus]))
        rules = records.groupby("rule", sort=False)
        fails = joined(*(failures(study, rows, self.drawn(study), taus).assign(rule=rule) for rule, rows in rules))
        moved = drift(records[records.when == "after"] if self.drift else records[:0], ["rule"], shared=True)
        shown = fails[fails.metric == "merge fail"].assign(row=titled)
        sizes, over = shown[shown.tau == self.tau], shown[shown["size"] == "all"].sort_values("tau", kind="stable")
        headings = sizes["size"] + " adapters (" + sizes["merges"].map("{:.0f}".format) + ")"
        sizes = sizes.assign(column=headings.where(sizes["size"] != "all", "MergeFail, all"))
        over = over.assign(column=over.tau.map("τ = {:g}".format))
        caption = f"MergeFail at τ = {self.tau:g}, % of merges (different ones)"
        tables = by_form(caption, sizes, "row", "merge-rules")
        tables |= by_form("MergeFail over the threshold, %", over, "row", stem="thresholds")
        text = (
            "A merge fails if some task keeps less than τ of the score of its adapter alone; a task whose score alone "
            "is 0 cannot fail. Intervals: 95 % over draws and merges; where all of n different merges agree, the exact "
            "one: of 72 that held, up to 5 % may fail."
        )
        return Findings(joined(fails, moved), tables | drift_tables(self.rules, moved), text=text)

    def drawn(self, study: Study) -> Drawn:
        """Return the merges, equally many for each seed; two seeds may draw the same."""
        domains, seeds = list(study.recipe.domains), study.seeds(self)
        draws = {seed: merge_instances(domains, self.sizes, seeds, self.instances, self.seed + seed) for seed in seeds}
        return [(seed, merge) for seed, sizes in draws.items() for merges in sizes.values() for merge in merges]


def failures(study: Study, records: pd.DataFrame, drawn: Drawn, taus: Sequence[float]) -> pd.DataFrame:
    """Return the MergeFail of one rule in per cent by size and threshold, and the differences to the first method."""
    items = scored(records, study.tasks)
    adapter = ["form", "method", "on", "trained"]
    alone = items[items.domain == items.on].rename(columns={"seed": "trained"})
    before = alone.groupby(adapter, sort=False)["value"].mean().rename("before")
    by = ["form", "method", "seed", "merge"]
    after = items[items.when == "after"].groupby([*by, "on"], sort=False)["value"].mean()
    pairs = after.rename("after").reset_index()
    pairs["size"] = [str(len(drawn[merge][1])) for merge in pairs["merge"]]
    trained = [dict(drawn[merge][1])[domain] for merge, domain in zip(pairs["merge"], pairs.on, strict=True)]
    pairs["trained"] = pd.Series(trained, dtype=object)
    pairs = pairs.join(before, on=adapter)
    parts = []
    for tau in taus:
        pairs["value"] = 100.0 * falls_below(pairs.after, pairs.before, tau)
        failed = pairs.groupby([*by, "size"], sort=False)["value"].max()
        paired = differences(failed.to_frame(0), first=True)[0].rename("value").reset_index()
        for metric, rows, further, unit in (
            ("merge fail", failed.reset_index(), [], "%"),
            ("merge fail", failed.reset_index(), ["size"], "%"),
            ("merge fail difference", paired, ["minus"], "pp"),
        ):
            if len(rows):
                parts.append(measured(hierarchical(rows, ["form", "method", *further]), metric, unit, tau=tau))
    numbers = joined(*parts).fillna({"size": "all"})
    different = Counter(str(len(merge)) for merge in {merge for _, merge in drawn})
    numbers["merges"] = numbers["size"].map(different | {"all": different.total()})
    return opened(numbers, numbers.merges)
