"""PEFT's own comparison of methods: trained on MetaMathQA, tested on GSM8K, accuracy against forgetting.

Forgetting is the mean loss of the next token on texts of an encyclopedia after training minus that of the bare base, in
nats. Source: github.com/huggingface/peft, method_comparison/MetaMathQA, as its pull request 3419 left the measure. How
far this study and that benchmark agree is said in the recipe `peft-metamath`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
import pandas as pd
from pydantic import Field

from hiplora.reporting import plots
from hiplora.study.protocols.metamath_json import result_file
from hiplora.study.protocols.settings import OfMethods, Settings
from hiplora.study.records import BASE, Findings, joined, measured, scored, table, tidy, with_jobs
from hiplora.study.statistics import hierarchical, replicates, student, summary

if TYPE_CHECKING:
    from hiplora.study.builder import Study
    from hiplora.study.jobs import Job
    from hiplora.study.store import Results

THEIRS = "PEFT's benchmark, not measured here"
SHOWN = {  # metric, or form of a score → heading, how many of the measurement's units are one of the table's, digits
    "accuracy": ("Test accuracy", 100, 3),
    "likelihood": ("Likelihood, %", 1, 1),
    "forgetting": ("Forgetting", 1, 4),
    "drift": ("KL", 1, 4),
    "trainable parameters": ("Trainable parameters", 1, 0),
    "training time": ("Training, min", 60, 1),
    "peak memory": ("Peak memory, GiB", 2**30, 1),
}


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
    numbers = with_jobs(_measured(settings, results, runs), runs)
    found = Findings(settings.name, settings.title, numbers)
    shown = _shown(settings, numbers)
    points = _points(shown)
    wide = table(shown, "column", digits=lambda row: row.digits)
    wide = wide[[heading for heading, *_ in SHOWN.values() if heading in wide]]
    found.tables[settings.name] = settings.title, wide
    if not points.empty:
        figure = plots.frontier(
            points, "accuracy", "forgetting", "line", x_low="low", x_high="high", label="label",
            xlabel="test accuracy", ylabel="forgetting (nats a token, lower is better)",
        )  # fmt: skip
        caption = "What was learned, and what it made the model forget"
        found.figures[f"{settings.name}-frontier"] = caption, figure
    for job, labels in runs[1:]:
        written = result_file(study, settings, labels["row"], labels["seed"], job, results)
        if written is not None:
            found.files[f"{settings.name}/{written[0]}"] = written[1]
    found.text = (
        "Accuracy: share of GSM8K's test questions whose derivation states the right answer. Likelihood: of a "
        "token of the reference solution. Forgetting: loss of the next token on the wiki texts minus the base "
        "model's, in nats. KL: divergence from the base there, nats a token. Of both, lower is better. Time: of "
        "the steps alone. Memory: allocated on a GPU, resident on a CPU. The benchmark's own points are of one seed "
        "each, by another training loop: what lies close to one of them is no better and no worse than it."
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


def _measured(settings: MetaMath, results: Results, runs: list) -> pd.DataFrame:
    """Scores with intervals over items; forgetting, drift and costs with Student's over the seeds."""
    records = tidy(results, runs)
    items = scored(records)
    draws = replicates(items, ["form", "method", "seed"])
    scores = summary(draws).join(hierarchical(items[items.method != BASE], ["form", "method"]))
    trained = [(job.needs["adapter"], labels) for job, labels in runs[1:]]
    costs = tidy(results, trained)
    costs = costs[(costs.metric == "parameters") & costs.method.isin(records.method)]
    times = [labels | (results.timing(job) or {}) for job, labels in trained]
    timed = pd.DataFrame(times, columns=["method", "seed", "training_seconds", "peak_memory_bytes"])
    timed = timed[timed.method.isin(costs.method)]
    texts = records[records.task == settings.text]
    forgetting = texts[texts.metric == "perplexity_ratio"]
    forgetting = forgetting.assign(value=np.log(forgetting.value))
    parts = [measured(scores, "score", "%")]
    for rows, column, metric, unit in (
        (forgetting, "value", "forgetting", "nats/token"),
        (texts[texts.metric == "kl"], "value", "drift", "nats/token"),
        (timed, "training_seconds", "training time", "s"),
        (timed, "peak_memory_bytes", "peak memory", "bytes"),
        (costs, "value", "trainable parameters", ""),
    ):
        values = rows.set_index(["method", "seed"])[column].astype(float).dropna()
        parts.append(measured(student(values), metric, unit))
    return joined(*parts, columns=["method", "metric", "form", "estimate", "low", "high"])


def _shown(settings: MetaMath, numbers: pd.DataFrame) -> pd.DataFrame:
    """What the table shows, in its units: ours, and the benchmark's points with their `label`."""
    looks = pd.DataFrame.from_dict(SHOWN, orient="index", columns=["column", "size", "digits"])
    key = numbers.metric.where(numbers.metric != "score", numbers.form)
    ours = numbers.assign(key=key, label="")[key.isin(SHOWN)]
    theirs = [
        {"method": f"{point.title} ({THEIRS})", "label": point.title, "key": key, "estimate": value}
        for point in sorted(settings.points, key=lambda point: point.accuracy)
        for key, value in (("accuracy", 100 * point.accuracy), ("forgetting", point.forgetting))
    ]
    shown = joined(ours, pd.DataFrame(theirs)).join(looks, on="key")
    return shown.assign(**{name: shown[name] / shown["size"] for name in ("estimate", "low", "high")})


def _points(shown: pd.DataFrame) -> pd.DataFrame:
    """Accuracy (a share) and forgetting of every method and of the benchmark's points."""
    accuracy = shown[shown.key == "accuracy"].set_index("method").rename(columns={"estimate": "accuracy"})
    forgetting = shown[shown.key == "forgetting"].set_index("method").estimate.rename("forgetting")
    points = accuracy[["accuracy", "low", "high", "label"]].join(forgetting, how="inner")
    return points.assign(line=points.index.where(points.label == "", THEIRS))
