"""What runs of edits found, edit by edit and question by question: the values that the section on editing shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hiplora.study.engine.jobs import Job
from hiplora.study.statistics import Draws, Resampler, over_seeds

OF_THE_EDITS = {  # metric → column of the edits' records
    "edit success": "success",
    "preferred": "preferred",
    "match": "exact",
    "paraphrase success": "paraphrase_success",
}
BY_CATEGORY = ("edit success", "paraphrase success")
NEIGHBOURS = "neighbours kept"
Columns = Mapping[str, Any]  # column → a value an edit, as `edit_columns` has them
Found = Mapping[str, Any]  # what a job of the kind `edit` found


@dataclass(frozen=True)
class Metric:
    """A metric with its replicates, each seed's value, and how many edits or questions it is the mean of."""

    draws: Draws
    by_seed: list[float]
    items: int


@dataclass(frozen=True)
class Edited:
    """A method's runs of a set and mode: its metrics, by category too, and of a sequence the success stage by stage."""

    title: str
    metrics: dict[str, Metric]
    categories: dict[str, dict[str, Metric]]  # category → metric
    course: list[tuple[int, Metric]]  # edits so far, success of all of them
    jobs: list[Job]
    edits: int
    questions: int


def edited(title: str, name: str, found: Sequence[Found], runs: list[Job], draws: Resampler) -> Edited:
    """Return what a method's runs found, one a seed, on the set `name`.

    An edit counts with its mean over the seeds that made it: one by one, each seed may draw other edits.
    """
    columns = [_columns(one) for one in found]
    metrics = {
        metric: _of_edits(columns, column, f"{name} edits", draws) for metric, column in OF_THE_EDITS.items()
    }
    if (near := _neighbours(columns, f"{name} neighbours", draws)) is not None:
        metrics[NEIGHBOURS] = near
    questions = [one["questions"] for one in found if one["questions"]]
    asked = len(questions) == len(found)
    if asked:
        metrics |= _locality(questions, draws)
    count = len(questions[0]["correct"]) if asked else 0
    categories, course = _categories(columns, name, draws), _course(found, name, draws)
    return Edited(title, metrics, categories, course, runs, metrics["edit success"].items, count)


def _columns(found: Found) -> Columns:
    """The records of all edits that count: after the last stage of a sequence, else of every stage."""
    stages = [stage["records"] for stage in found["stages"]]
    if found["mode"] == "sequential":
        return stages[-1]
    whole = {column for column in stages[0] if column != "neighbours_kept"}
    joined = {column: [value for stage in stages for value in stage[column]] for column in whole}
    near = [stage["neighbours_kept"] or [[]] * len(stage["index"]) for stage in stages]
    kept = [some for stage in near for some in stage]
    return {**joined, "neighbours_kept": kept if any(kept) else None}


def _mean(values: Sequence[Mapping[int, float]], task: str, draws: Resampler) -> Metric:
    """The mean over edits, by `values[seed][edit]`, each edit with its mean over the seeds that have it."""
    by_edit: dict[int, list[float]] = {}
    for one in values:
        for index, value in one.items():
            by_edit.setdefault(index, []).append(value)
    items = [float(np.mean(by_edit[index])) for index in sorted(by_edit)]
    by_seed = [float(np.mean(list(one.values()))) for one in values if one]
    return Metric(draws.mean(task, items), by_seed, len(items))


def _of_edits(
    columns: Sequence[Columns], column: str, task: str, draws: Resampler, category: str | None = None
) -> Metric:
    """A column's mean in per cent, of the edits of a category or of all."""
    values = [
        {
            index: 100 * float(value)
            for index, value, of in zip(one["index"], one[column], one["category"], strict=True)
            if category in (None, of)
        }
        for one in columns
    ]
    return _mean(values, task, draws)


def _neighbours(columns: Sequence[Columns], task: str, draws: Resampler) -> Metric | None:
    """The share of questions near an edit whose answers stay, mean over the edits that have such; None without any."""
    values = [
        {
            index: 100 * float(np.mean(kept))
            for index, kept in zip(
                one["index"], one["neighbours_kept"] or [[]] * len(one["index"]), strict=True
            )
            if kept
        }
        for one in columns
    ]
    return _mean(values, task, draws) if any(values) else None


def _categories(columns: Sequence[Columns], name: str, draws: Resampler) -> dict[str, dict[str, Metric]]:
    categories = sorted({str(category) for one in columns for category in one["category"]})
    return {
        category: {
            metric: _of_edits(columns, OF_THE_EDITS[metric], f"{name} {category}", draws, category)
            for metric in BY_CATEGORY
        }
        for category in categories
    }


def _locality(questions: Sequence[Mapping[str, list[float]]], draws: Resampler) -> dict[str, Metric]:
    """The metrics of the unrelated questions: in pp and %, and in nats."""

    def metric(values: Sequence[list[float]]) -> Metric:
        by_seed = [float(np.mean(one)) for one in values]
        return Metric(draws.mean("questions", over_seeds(values)), by_seed, len(values[0]))

    def change(after: str, before: str, scale: float) -> Metric:
        return metric([(scale * np.subtract(one[after], one[before])).tolist() for one in questions])

    return {
        "locality": change("correct_before", "correct", 100.0),
        "locality damage": metric([(100 * (1 - np.asarray(one["unchanged"]))).tolist() for one in questions]),
        "log-probability change": change("log_prob", "log_prob_before", 1.0),
        "edited log-probability change": change("edited_log_prob", "edited_log_prob_before", 1.0),
    }


def _course(found: Sequence[Found], name: str, draws: Resampler) -> list[tuple[int, Metric]]:
    """Of a sequence, the success of all edits so far after each stage."""
    if any(one["mode"] != "sequential" for one in found):
        return []
    course = []
    for stages in zip(*(one["stages"] for one in found), strict=True):
        success = _of_edits([stage["records"] for stage in stages], "success", f"{name} edits", draws)
        course.append((success.items, success))
    return course
