"""PEFT's own comparison of methods: trained on MetaMathQA, tested on GSM8K, accuracy against forgetting.

Forgetting is the mean loss of the next token on texts of an encyclopedia after training minus that of the bare base, in
nats. Source: github.com/huggingface/peft, method_comparison/MetaMathQA, as its pull request 3419 left the measure. How
far this study and that benchmark agree is said in the recipe `peft-metamath`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
import pandas as pd
from pydantic import Field

from hiplora.reporting import interval, plots
from hiplora.study.protocols.metamath_json import result_file
from hiplora.study.protocols.settings import OfMethods, Settings
from hiplora.study.records import BASE, Findings, joined, measured, scored, tidy, with_jobs
from hiplora.study.statistics import differences, hierarchical, replicates, student, summary

if TYPE_CHECKING:
    from hiplora.study.builder import Study
    from hiplora.study.jobs import Job
    from hiplora.study.store import Results

THEIRS = "PEFT's benchmark, not measured here"


class BenchmarkPoint(Settings):
    """A method's result as a benchmark of others reports it."""

    title: str = Field(min_length=1, description="The method, as tables show it.")
    accuracy: Annotated[float, Field(ge=0, le=1)] = Field(description="Share of right answers.")
    forgetting: float = Field(description="How much the loss on its texts grew, in nats a token.")
    source: str = Field(min_length=1, description="Where it is reported.")


class MetaMath(OfMethods):
    """PEFT's own comparison of methods: accuracy against forgetting, with its results' files in its format."""

    name: ClassVar[str] = "metamath"
    title: ClassVar[str] = "PEFT's comparison of methods"
    domain: str = Field(description="Domain that is trained on; its first task gives the accuracy.")
    text: str = Field(description="Text of `evaluation.drift` whose loss tells the forgetting.")
    points: list[BenchmarkPoint] = Field(
        default=[], description="What the benchmark reports itself, to set beside what is measured here."
    )


def jobs(study: Study, settings: MetaMath) -> list[Job]:
    """Score the base, and the adapter of every method and seed with its drift."""
    return [job for job, _ in _runs(study, settings)]


def tables(study: Study, settings: MetaMath, results: Results) -> Findings:
    """Return accuracy, forgetting and cost beside the benchmark's own points, the two against each other, the files."""
    runs = list(_runs(study, settings))
    records = tidy(results, runs)
    trained = [(job.needs["adapter"], labels) for job, labels in runs if "adapter" in job.needs]
    costs = tidy(results, trained)
    found = Findings(settings.name, settings.title)
    found.measured = with_jobs(_measured(settings, records, costs, results, trained), runs)
    found.tables[settings.name] = settings.title, _table(settings, found.measured)
    points = _points(settings, found.measured)
    if not points.empty:
        figure = plots.frontier(
            points, "accuracy", "forgetting", "line", x_low="low", x_high="high", label="label",
            xlabel="test accuracy", ylabel="forgetting (nats a token, lower is better)",
        )  # fmt: skip
        found.figures[f"{settings.name}-frontier"] = (
            "What was learned, and what it made the model forget",
            figure,
        )
    for job, labels in runs[1:]:
        method = labels["row"]
        written = result_file(study, settings, method, labels["seed"], job.needs["adapter"], job, results)
        if written is not None:
            found.files[f"{settings.name}/{written[0]}"] = written[1]
    found.text = (
        "Accuracy: share of GSM8K's test questions whose derivation states the right answer. Likelihood: of a "
        "token of the reference solution. Forgetting: loss of the next token on the wiki texts minus the base "
        "model's, in nats. KL: divergence from the base there, nats a token. Of both, lower is better. Time: of "
        "the steps alone. Memory: allocated on a GPU, resident on a CPU. The frontier is that of the benchmark's "
        "own points, one seed each, by another training loop: what lies close to one of them is no better and no "
        "worse than it."
    )
    return found


def _runs(study: Study, settings: MetaMath) -> Iterator[tuple[Job, dict]]:
    tasks = study.tasks_of([settings.domain])
    yield study.score(tasks=tasks), {"method": BASE}
    for method in settings.methods:
        row = study.row(method)
        for seed in study.seeds(settings):
            adapter = study.adapter(row, settings.domain, seed)
            yield study.score(adapter, tasks), {"method": row.title, "row": method, "seed": seed}


def ahead(accuracy: float, forgetting: float, others: Sequence[BenchmarkPoint]) -> BenchmarkPoint | None:
    """Return one of the others that is no worse in accuracy and forgetting and better in one; None on the frontier."""
    for other in others:
        as_good = other.accuracy >= accuracy and other.forgetting <= forgetting
        if as_good and (other.accuracy, other.forgetting) != (accuracy, forgetting):
            return other
    return None


def _measured(
    settings: MetaMath, records: pd.DataFrame, costs: pd.DataFrame, results: Results, trained: list
) -> pd.DataFrame:
    items = scored(records)
    draws = replicates(items, ["form", "method", "seed"])
    adapted = draws[draws.index.get_level_values("method") != BASE]
    wide = hierarchical(items[items.method != BASE], ["form", "method"])
    parts = [
        measured(summary(draws).join(wide), "score", "%", domain=settings.domain),
        measured(summary(differences(adapted, first=True)), "score difference", "pp", domain=settings.domain),
    ]
    texts = records[records.task == settings.text]
    labels = {"domain": settings.domain, "text": settings.text}
    for metric, stored in (("forgetting", "perplexity_ratio"), ("drift", "kl")):
        rows = texts[texts.metric == stored].set_index(["method", "seed"])["value"]
        values = np.log(rows) if metric == "forgetting" else rows
        parts.append(measured(student(values), metric, "nats/token", **labels))
    timings = [
        {**labels, **(results.timing(job) or {})} for job, labels in trained if results.get(job) is not None
    ]
    whole = set(costs.method) & set(records.method)
    for metric, field, unit in (
        ("training time", "training_seconds", "s"),
        ("peak memory", "peak_memory_bytes", "bytes"),
    ):
        known = {
            (one["method"], one["seed"]): one[field]
            for one in timings
            if field in one and one["method"] in whole
        }
        if known:
            index = pd.MultiIndex.from_tuples(known, names=["method", "seed"])
            parts.append(measured(student(pd.Series(list(known.values()), index, dtype=float)), metric, unit))
    counts = (
        costs[(costs.metric == "parameters") & costs.method.isin(whole)]
        .groupby("method", sort=False)["value"]
        .first()
    )
    parts.append(measured(counts.rename("estimate"), "trainable parameters"))
    found = joined(*parts)
    plain = ~found.metric.isin(("score", "score difference"))
    return found.assign(low=found.low.where(~plain), high=found.high.where(~plain))


def _points(settings: MetaMath, numbers: pd.DataFrame) -> pd.DataFrame:
    """Accuracy (a share) and forgetting of every method and of the benchmark's points."""
    score = numbers[(numbers.metric == "score") & (numbers.form == "accuracy")].set_index("method")
    forgetting = numbers[numbers.metric == "forgetting"].set_index("method").estimate
    ours = (score[["estimate", "low", "high"]] / 100).rename(columns={"estimate": "accuracy"})
    ours = ours.join(forgetting.rename("forgetting"), how="inner").reset_index().assign(label="")
    ours["line"] = ours.method
    theirs = pd.DataFrame(
        [
            (p.accuracy, p.forgetting, p.title, THEIRS)
            for p in sorted(settings.points, key=lambda p: p.accuracy)
        ],
        columns=["accuracy", "forgetting", "label", "line"],
    )
    return pd.concat([ours, theirs], ignore_index=True) if len(ours) else ours


def _table(settings: MetaMath, numbers: pd.DataFrame) -> pd.DataFrame:
    columns: dict[str, dict[str, str]] = {}
    for row in numbers.to_dict("records"):
        cell = columns.setdefault(row["method"], {})
        value, low, high = (row.get(name) for name in ("estimate", "low", "high"))
        if row["metric"] == "score" and row["form"] == "accuracy":
            cell["Test accuracy"] = interval(value / 100, low / 100, high / 100, 3)
        elif row["metric"] == "score":
            cell["Likelihood, %"] = interval(value, low, high)
        elif row["metric"] in ("forgetting", "drift"):
            cell["Forgetting" if row["metric"] == "forgetting" else "KL"] = f"{value:.4f}"
        elif row["metric"] == "trainable parameters":
            cell["Trainable parameters"] = f"{value:,.0f}"
        elif row["metric"] in ("training time", "peak memory"):
            heading, unit = {"s": ("Training, min", 60), "bytes": ("Peak memory, GiB", 2**30)}[row["unit"]]
            cell[heading] = f"{value / unit:.1f}"
    places = [
        (one.method, one.accuracy, one.forgetting)
        for one in _points(settings, numbers).itertuples()
        if one.line != THEIRS
    ]
    for point in settings.points:
        title = f"{point.title} ({THEIRS})"
        columns[title] = {"Test accuracy": f"{point.accuracy:.3f}", "Forgetting": f"{point.forgetting:.4f}"}
        places.append((title, point.accuracy, point.forgetting))
    for title, accuracy, forgetting in places if settings.points else ():
        better = ahead(accuracy, forgetting, settings.points)
        columns[title]["The benchmark's frontier"] = (
            "on it" if better is None else f"behind its {better.title}"
        )
    order = ("Test accuracy", "Likelihood, %", "Forgetting", "KL", "Trainable parameters", "Training, min")
    wide = pd.DataFrame.from_dict(columns, orient="index").rename_axis("Method")
    return wide.reindex(columns=[*order, "Peak memory, GiB", "The benchmark's frontier"]).fillna("–")
