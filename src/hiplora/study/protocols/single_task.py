"""Each method trained on each domain alone and scored on all of them: Table 1 of the paper, with Retain (Eq. 11).

The comparison with AdaLoRA (Table 12) is the same table of other methods.
"""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import pandas as pd

from hiplora.reporting import plots
from hiplora.study.protocols.settings import Done, Findings, OfMethods, Run, Study
from hiplora.study.records import BASE, by_form, joined, measured, scored, tidy, with_differences
from hiplora.study.statistics import averaged, drift, replicates, summary


class SingleTask(OfMethods):
    """Each method trained on each domain alone, scored on all: the paper's single-task table with Retain."""

    paper: ClassVar[str] = "single-task"  # the paper's table

    def runs(self, study: Study) -> list[Run]:
        """Score the base, and the adapter of every method, domain and seed."""
        return score_runs(study, map(study.row, self.methods), study.seeds(self), study.recipe.domains)

    def tables(self, study: Study, done: Done) -> Findings:
        """Return the domains' scores and Retain in both forms, the drift, and what was trained."""
        records = tidy(done)
        numbers, moved = scores_and_retain(study, records), drift(records[records.method != BASE])
        tables = by_form("Scores and Retain, %", with_columns(study, numbers), paper=self.paper)
        tables["drift"] = drift_table(moved)
        tables["training"] = "What was trained", self._trained(study, done)
        text = (
            "Each domain is scored by the adapter that was trained on it. Retain: mean drop on the other domains' "
            "tasks against the base model, in percentage points; lower is better."
        )
        figures = {"retain": ("What was learned, and what it cost elsewhere", retain_figure(numbers))}
        return Findings(joined(numbers, moved), tables, figures, text)

    def _trained(self, study: Study, done: Done) -> pd.DataFrame:
        """What each method trained: parameters, learning rate, held-out loss before and after."""
        records = tidy(trainings(study, done))
        means = records.pivot_table(index="method", columns="metric", values="value", sort=False)
        rates = {}
        for row in map(study.row, self.methods):
            choice = study.rate(row)
            rate = (study.store.result(choice) or {}) if choice else {"value": study.recipe.given_rate(row)}
            rates[row.title] = rate.get("value"), "at the edge of the grid" if rate.get("at_the_edge") else ""
        wide = pd.DataFrame.from_dict(rates, orient="index", columns=["Learning rate", ""]).rename_axis("Method")
        means = means.reindex(wide.index, columns=["parameters", "held_out_before", "held_out_after"])
        wide.insert(0, "Trainable parameters", means.parameters.astype("Int64"))
        return wide.assign(**{"Held-out loss before": means.held_out_before, "After": means.held_out_after})


class AdaLora(SingleTask):
    """The same table for the comparison with AdaLoRA."""

    paper: ClassVar[str] = "adalora"


def score_runs(study: Study, rows: Iterable[Any], seeds: Sequence[int], domains: Any, like: Any = None) -> list[Run]:
    """Return the jobs that score the base, and the adapters of methods on domains, with their labels.

    `like` is the method whose learning rate all of them take.
    """
    labels = [(row, {"method": row.title, "domain": d, "seed": s}) for row in rows for s in seeds for d in domains]
    adapters = [(study.adapter(row, label["domain"], label["seed"], like=like), label) for row, label in labels]
    return [(study.score(), {"method": BASE}), *((study.score(adapter), label) for adapter, label in adapters)]


def trainings(study: Study, done: Done) -> Done:
    """Return the trainings of the adapters that jobs scored, with the same labels."""
    adapters = [(job.needs["adapter"], labels) for job, _, labels in done if "adapter" in job.needs]
    return [(job, study.store.record(job) or {}, labels) for job, labels in adapters]


def scores_and_retain(study: Study, records: pd.DataFrame) -> pd.DataFrame:
    """Return each method's scores on its own domains, their mean, Retain, and paired differences, as measurements."""
    items = scored(records, study.tasks)
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


def retain_figure(numbers: pd.DataFrame, title: str = "") -> Any:
    """Return the figure of Retain over the mean likelihood: a line for each method or, with `title`, one for all."""
    shown = numbers[(numbers.form == "likelihood") & (numbers.method != BASE)]
    mean, retain = (shown[shown.metric == metric].set_index("method") for metric in ("mean score", "retain"))
    points = retain.join(mean[["estimate", "low", "high"]].add_prefix("x_")).reset_index()
    points["line"] = title or points.method
    return plots.lines(
        points, "x_estimate", "estimate", "line", low="low", high="high", x_low="x_low", x_high="x_high",
        label="method" if title else None, xlabel="mean likelihood, own domain (%)",
        ylabel="Retain (pp, lower is better)",
    )  # fmt: skip
