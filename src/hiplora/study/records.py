"""Job results as one tidy table, and what a protocol returns: measurements, and the tables and figures made of them."""

import functools
import importlib.resources
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from hiplora.reporting import interval
from hiplora.study.jobs import Job
from hiplora.study.statistics import differences, summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMS = {"score": "accuracy", "likelihood": "likelihood"}  # a task's items as stored → the form of the score
BASE = "Base model"
Run = tuple[Job, dict[str, Any]]  # a job with what tells its rows apart
Done = Sequence[tuple[Job, dict[str, Any], dict[str, Any]]]  # finished jobs, their records, and the same labels
Tables = dict[str, tuple[str, pd.DataFrame]]  # file name → caption, table


@dataclass
class Findings:
    """The results of a protocol, as far as its jobs are done; `missing` names the others.

    `measured` has a row a number: method, metric, estimate, low, high, sd over seeds, seeds, unit, and whatever else
    tells it apart. `figures` are file name → (caption, figure), `files` name → text of what else the report gets. The
    names of tables and figures are what comes after the protocol's, which `sections` puts before.
    """

    measured: pd.DataFrame = field(default_factory=pd.DataFrame)
    tables: Tables = field(default_factory=dict)
    figures: dict[str, "tuple[str, Figure]"] = field(default_factory=dict)
    text: str = ""
    files: dict[str, str] = field(default_factory=dict)
    name: str = ""
    title: str = ""
    missing: list[str] = field(default_factory=list)


def tidy(done: Done) -> pd.DataFrame:
    """Return the numbers in the results of jobs, a row each: the job's labels, run, task, metric, item, value.

    `metric`: of a task `accuracy` and `likelihood`, a row an item, in per cent; of a drift text `kl` and
    `perplexity_ratio`; of a training `loss` by step, `held_out_before`, `held_out_after` and `parameters`.
    """
    names = list(dict.fromkeys(name for *_, labels in done for name in labels))
    rows = [
        (*(labels.get(name, "") for name in names), job.key, task, metric, list(values))
        for job, record, labels in done
        for task, metric, values in _numbers(record["result"])
    ]
    frame = pd.DataFrame(rows, columns=[*names, "run", "task", "metric", "value"])
    frame = frame.explode("value").astype({"value": float})
    return frame.assign(item=frame.groupby(level=0).cumcount()).reset_index(drop=True)


def _numbers(result: Mapping[str, Any]) -> Iterator[tuple[str, str, Sequence[float]]]:
    for task, scores in result.get("tasks", {}).items():
        for stored, form in FORMS.items():
            if scores[stored] is not None:
                yield task, form, scores[stored]
    for text, drift in (result.get("drift") or {}).items():
        for metric in ("kl", "perplexity_ratio"):
            yield text, metric, [drift[metric]]
    if "curve" in result:
        losses = dict(result["curve"])
        yield "training", "loss", [losses.get(step, np.nan) for step in range(max(losses, default=-1) + 1)]
        yield "training", "parameters", [result["trainable_parameters"]]
        for metric in ("held_out_before", "held_out_after"):
            if result[metric] is not None:
                yield "training", metric, [result[metric]]


def scored(frame: pd.DataFrame, tasks: Mapping[str, str] | None = None, column: str = "on") -> pd.DataFrame:
    """Return the rows of a tidy table that are scores, their metric as the column `form`.

    With `tasks` those of these tasks alone, and what stands for each in another column.
    """
    rows = frame[frame.metric.isin(FORMS.values())].rename(columns={"metric": "form"})
    return rows if tasks is None else rows[rows.task.isin(tasks)].assign(**{column: lambda df: df.task.map(tasks)})


def measured(frame: pd.DataFrame, metric: str, unit: str = "", **labels: Any) -> pd.DataFrame:
    """Return summaries as measurements: their index as columns, with the metric's name, its unit and more labels."""
    return frame.reset_index().assign(metric=metric, unit=unit, **labels)


def with_differences(draws: pd.DataFrame, metric: str, unit: str = "pp") -> pd.DataFrame:
    """Return replicates as measurements: each method's own, and the paired differences between the trained ones."""
    paired = differences(draws[draws.index.get_level_values("method") != BASE])
    return joined(measured(summary(draws), metric, unit), measured(summary(paired), f"{metric} difference", "pp"))


def joined(*parts: pd.DataFrame, columns: Sequence[str] = ()) -> pd.DataFrame:
    """Return measurements below each other, with the columns of all parts and some more."""
    names = list(dict.fromkeys(name for frame in (*parts, columns) for name in frame))
    filled = [part for part in parts if len(part)]
    whole = pd.concat(filled, ignore_index=True) if filled else pd.DataFrame()
    return whole.reindex(columns=names)


def table(frame: pd.DataFrame, rows: str = "method", paper: str = "", order: Sequence[str] = ()) -> pd.DataFrame:
    """Return measurements as a table of "estimate [low, high]", rows in the order that they come in.

    The frame's `column` names the column of each, its `digits`, if it has them, the decimal places. Columns of `order`
    come first. `paper` names the paper's table, of accuracies, whose values stand behind ours.
    """
    texts = []
    for row in frame.itertuples():
        text = interval(row.estimate, row.low, row.high, int(getattr(row, "digits", 1)))
        in_paper = paper and getattr(row, "form", None) != "likelihood"
        reported = paper_value(paper, getattr(row, rows), row.column) if in_paper else None
        texts.append(text if reported is None else f"{text} (paper: {reported:g})")
    wide = frame.assign(text=texts).pivot(index=rows, columns="column", values="text")
    columns = dict.fromkeys([*(name for name in order if name in wide), *frame.column.unique()])
    ordered = wide.reindex(index=frame[rows].unique(), columns=list(columns)).fillna("–")
    return ordered.rename_axis(index=rows.capitalize(), columns=None)


def by_form(caption: str, numbers: pd.DataFrame, rows: str = "method", paper: str = "", stem: str = "") -> Tables:
    """Return a table of measurements for each form of the score."""
    parts = {form: numbers[numbers.form == form] for form in FORMS.values()}
    return {
        f"{stem}-{form}".lstrip("-"): (f"{caption}: {form}", table(part, rows, paper)) for form, part in parts.items()
    }


def paper_value(name: str, row: str, column: str) -> float | None:
    """Return the paper's number of a table's row and column (without its unit); None where it has none."""
    rows = {_plain(title): values for title, values in paper()["tables"][name]["rows"].items()}
    values = {_plain(title): value for title, value in rows.get(_plain(row), {}).items()}
    value = values.get(_plain(column.partition(",")[0]))
    return value["value"] if isinstance(value, Mapping) else value


@functools.cache
def paper() -> dict[str, Any]:
    """Return what the paper reports: its model, tables and claims, as `paper.yaml` has them."""
    import yaml

    return yaml.safe_load(importlib.resources.files("hiplora.study").joinpath("paper.yaml").read_text("utf-8"))


def _plain(name: str) -> str:
    """A name without case and punctuation: `HiP-LoRA` and `hiplora` are one."""
    return re.sub(r"[^a-z0-9@]", "", name.lower())
