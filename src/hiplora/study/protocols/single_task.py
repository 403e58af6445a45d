"""Each method trained on each domain alone and scored on all of them: Table 1 of the paper, with Retain (Eq. 11).

The comparison with AdaLoRA (Table 12) is the same table of other methods.
"""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import pandas as pd

from hiplora.reporting import plots
from hiplora.study.protocols.settings import Findings, OfMethods, Results, Run, Study
from hiplora.study.records import BASE, by_form, joined, measured, scored, tidy, with_differences
from hiplora.study.statistics import averaged, drift, replicates, summary


class SingleTask(OfMethods):
    """Each method trained on each domain alone, scored on all: the paper's single-task table with Retain."""

    name: ClassVar[str] = "single-task"
    title: ClassVar[str] = "Single tasks"

    def runs(self, study: Study) -> list[Run]:
        """Score the base, and the adapter of every method, domain and seed."""
        return score_runs(study, map(study.row, self.methods), study.seeds(self), study.recipe.domains)

    def tables(self, study: Study, results: Results, runs: Sequence[Run]) -> Findings:
        """Return the domains' scores and Retain in both forms, the drift, and what was trained."""
        records = tidy(results, runs)
        numbers, moved = scores_and_retain(study, records), drift(records[records.method != BASE])
        found = Findings(joined(numbers, moved))
        found.tables = by_form(self.name, f"{self.title}, %", with_columns(study, numbers), paper=self.name)
        found.tables[f"{self.name}-drift"] = drift_table(moved)
        found.tables[f"{self.name}-training"] = "What was trained", self._trained(study, results, runs)
        found.text = (
            "Each domain is scored by the adapter that was trained on it. Retain: mean drop on the other domains' "
            "tasks against the base model, in percentage points; lower is better."
        )
        figure = retain_figure(numbers)
        if figure is not None:
            found.figures[f"{self.name}-retain"] = "What was learned, and what it cost elsewhere", figure
        return found

    def _trained(self, study: Study, results: Results, runs: Sequence[Run]) -> pd.DataFrame:
        """What each method trained: parameters, learning rate, held-out loss before and after."""
        records = tidy(results, trainings(runs))
        means = records.pivot_table(index="method", columns="metric", values="value", sort=False)
        rows = {row.title: study.chosen_rate(row, results) for row in map(study.row, self.methods)}
        found = pd.DataFrame.from_dict(rows, orient="index", columns=["Learning rate", ""]).rename_axis("Method")
        means = means.reindex(found.index, columns=["parameters", "held_out_before", "held_out_after"])
        found.insert(0, "Trainable parameters", means.parameters.astype("Int64"))
        return found.assign(**{"Held-out loss before": means.held_out_before, "After": means.held_out_after})


class AdaLora(SingleTask):
    """The same table for the comparison with AdaLoRA."""

    name: ClassVar[str] = "adalora"
    title: ClassVar[str] = "Comparison with AdaLoRA"


def score_runs(study: Study, rows: Iterable[Any], seeds: Sequence[int], domains: Any, like: Any = None) -> list[Run]:
    """Return the jobs that score the base, and the adapters of methods on domains, with their labels.

    `like` is the method whose learning rate all of them take.
    """
    found: list[Run] = [(study.score(), {"method": BASE})]
    for row in rows:
        for seed in seeds:
            for domain in domains:
                job = study.score(study.adapter(row, domain, seed, like=like))
                found.append((job, {"method": row.title, "domain": domain, "seed": seed}))
    return found


def trainings(runs: Iterable[Run]) -> list[Run]:
    """Return the trainings of the adapters that jobs score, with the same labels."""
    return [(job.needs["adapter"], labels) for job, labels in runs if "adapter" in job.needs]


def scores_and_retain(study: Study, records: pd.DataFrame) -> pd.DataFrame:
    """Return each method's scores on its own domains, their mean, Retain, and paired differences, as measurements."""
    domains = {domain.task: name for name, domain in study.recipe.domains.items()}
    items = scored(records)
    items = items[items.task.isin(domains)].assign(on=items.task.map(domains))
    if BASE not in set(items.method):
        return joined(columns=["method", "form", "metric", "estimate", "low", "high", "domain"])
    items["domain"] = items.domain.where(items.method != BASE, items.on)  # each domain is the base's own
    draws = replicates(items, ["form", "method", "domain", "seed", "on"])
    is_own = draws.index.get_level_values("domain") == draws.index.get_level_values("on")
    own, others = draws[is_own].droplevel("on"), draws[~is_own]
    base = own.xs(BASE, level="method").droplevel("seed").rename_axis(index={"domain": "on"})
    drops = others.rsub(base.reindex(others.index.droplevel(["method", "domain", "seed"])).to_numpy())
    scores = measured(summary(own), "score", "%")
    return joined(
        scores.assign(items=scores.domain.map(items.groupby("on")["item"].nunique())),
        with_differences(averaged(own, ["domain"]), "mean score", "%"),
        with_differences(averaged(drops, ["domain", "on"]), "retain"),
    )


def with_columns(study: Study, numbers: pd.DataFrame, domains: Iterable[str] = (), mean: str = "Mean") -> pd.DataFrame:
    """Return the measurements that a table of scores and Retain shows, with their column."""
    titles = {name: study.recipe.domains[name].title for name in domains or study.recipe.domains}
    headings = numbers.metric.map({"mean score": mean, "retain": "Retain"})
    headings = headings.where(numbers.metric != "score", numbers.domain.map(titles))
    return numbers.assign(column=headings).dropna(subset="column")


def drift_table(moved: pd.DataFrame, title: str = "Drift from the base model") -> tuple[str, pd.DataFrame]:
    """Return the table of mean drifts, in thousandths of a nat a token."""
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
    return plots.lines(
        points, "x_estimate", "estimate", "line", low="low", high="high", x_low="x_low", x_high="x_high",
        label="method" if label else None, xlabel="mean likelihood, own domain (%)",
        ylabel="Retain (pp, lower is better)",
    )  # fmt: skip
