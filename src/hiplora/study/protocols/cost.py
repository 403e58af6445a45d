"""What each method costs: throughput over steady steps, peak memory, and the one-time cost of its factors (Table 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
from pydantic import Field

from hiplora.reporting import interval
from hiplora.study.protocols.settings import OfMethods, Positive
from hiplora.study.records import Findings, paper_value
from hiplora.study.statistics import student

if TYPE_CHECKING:
    from hiplora.study.builder import Study
    from hiplora.study.jobs import Job
    from hiplora.study.store import Results


class CostTable(OfMethods):
    """Throughput, memory, the one-time cost of the factors."""

    name: ClassVar[str] = "cost"
    title: ClassVar[str] = "Cost"
    domain: str = Field(description="Domain whose rows are trained on.")
    warmup: int = Field(default=20, ge=0, description="Steps before the measured ones.")
    steps: Positive = Field(default=200, description="Measured steps.")
    repeats: Positive = Field(
        default=1,
        description="Times that each method is timed, in turn with the others; of one there is no interval.",
    )


def jobs(study: Study, settings: CostTable) -> list[Job]:
    """Time every method, all of them as often as is asked for in turn, and compute the factors of those with some."""
    timed = [
        _speed(study, settings, method, n) for n in range(settings.repeats) for method in settings.methods
    ]
    factors = [study.factors(study.row(method)) for method in settings.methods]
    return [*timed, *(job for job in factors if job is not None)]


def tables(study: Study, settings: CostTable, results: Results) -> Findings:
    """Return throughput and memory, with ratios to the first method that is named, and the cost of the factors."""
    found = Findings(settings.name, settings.title)
    costs = {method: _cost(study, settings, results, method) for method in settings.methods}
    known = [cost for cost in costs.values() if cost is not None]
    first = costs[settings.methods[0]]
    if known:
        found.measured = pd.DataFrame([row for cost in known for row in _measured(cost, first)])
        found.tables[f"{settings.name}-table"] = (
            settings.title,
            _table(found.measured, study.row(settings.methods[0]).title),
        )
    machines = sorted({cost["machine"] for cost in known})
    times = (
        "once"
        if settings.repeats == 1
        else f"{settings.repeats} times in turn; intervals are Student's t over the times"
    )
    found.text = (
        f"Measured on {'; '.join(machines) or '–'}, each method in a process of its own while nothing else of the "
        f"study ran, over {settings.steps} steps after {settings.warmup} to warm up, {times}. Factors: computing "
        "the protected directions once for a base model, calibration included, or verifying them where they were "
        "cached. Cache: k(m + n + 1) numbers a matrix."
    )
    return found


def _speed(study: Study, settings: CostTable, method: str, time: int) -> Job:
    """The job that times a method, the n-th time: its training recipe at the study's rate, which changes no time."""
    row = study.row(method)
    trained = study.adapter(row, settings.domain, study.seeds(settings)[0], lr=study.recipe.train.lr)
    asked = {
        "recipe": trained.settings["recipe"],
        "warmup": settings.warmup,
        "steps": settings.steps,
        "files": trained.settings["files"],
        **({"repeat": time} if time else {}),
    }
    needs = {name: job for name, job in trained.needs.items() if name == "factors"}
    again = f", time {time + 1}" if time else ""
    return study.job("speed", f"time {row.title}{again}", asked, **needs)


def _cost(study: Study, settings: CostTable, results: Results, method: str) -> dict[str, Any] | None:
    """What was timed of a method: speeds in tokens per second, peak memory in bytes, and its factors."""
    row, timed = study.row(method), [_speed(study, settings, method, n) for n in range(settings.repeats)]
    if None in [results.get(job) for job in timed]:
        return None
    timings, factors = [results.timing(job) or {} for job in timed], study.factors(row)
    memory = [one["peak_memory_bytes"] for one in timings if one["peak_memory_bytes"] is not None]
    made = None if factors is None else results.get(factors)
    return {
        "title": row.title,
        "jobs": " ".join(job.key[:8] for job in timed),
        "speeds": [one["tokens_per_second"] for one in timings],
        "memory": max(memory, default=None),
        "factors": None
        if made is None
        else {**(results.timing(factors) or {}), "bytes": made["bytes"], "job": factors.key[:8]},
        "machine": ", ".join(filter(None, (timings[0].get("gpu"), results.machine(timed[0])))),
    }


def _measured(cost: dict[str, Any], first: dict[str, Any] | None) -> list[dict[str, Any]]:
    label = {"method": cost["title"], "machine": cost["machine"], "jobs": cost["jobs"]}
    rows = [{"metric": "throughput", "estimate": float(np.mean(cost["speeds"])), "unit": "tokens/s"}]
    if cost["memory"] is not None:
        rows.append({"metric": "peak memory", "estimate": cost["memory"], "unit": "bytes"})
    if first is not None:
        # The methods were timed in turn: the n-th times are compared with each other.
        speeds = pd.Series(np.divide(cost["speeds"], first["speeds"]))
        ratio = student(pd.concat({0: speeds}, names=["of", "seed"])).iloc[0]
        told = {"unit": "ratio", "over": first["title"]}
        rows.append({"metric": "throughput ratio", **ratio[["estimate", "low", "high"]], **told})
        if cost["memory"] and first["memory"]:
            rows.append({"metric": "peak memory ratio", "estimate": cost["memory"] / first["memory"], **told})
    if (factors := cost["factors"]) is not None:
        of = {"jobs": factors["job"]}
        rows.append(
            {
                "metric": "factors",
                "estimate": factors["factorize_seconds"],
                "unit": "seconds",
                "reused": factors["reused"],
                **of,
            }
        )
        rows.append({"metric": "cache", "estimate": factors["bytes"], "unit": "bytes", **of})
    return [{**label, **row} for row in rows]


def _table(numbers: pd.DataFrame, first: str) -> pd.DataFrame:
    columns = {  # metric → heading, scale, digits, the paper's column
        "throughput": ("Tokens per second", 1.0, 0, "Tokens per second"),
        "throughput ratio": (f"Of {first}'s", 1.0, 3, None),
        "peak memory": ("Peak memory, GB", 1e9, 2, "Peak memory"),
        "peak memory ratio": (f"Of {first}'s memory", 1.0, 3, None),
        "factors": ("SVD minutes", 60.0, 2, "SVD minutes"),
        "cache": ("Cache size, GB", 1e9, 4, "Cache size"),
    }
    found: dict[str, dict[str, str]] = {}
    for row in numbers.to_dict("records"):
        heading, scale, digits, theirs = columns[row["metric"]]
        text = interval(row["estimate"] / scale, row.get("low"), row.get("high"), digits)
        text += " (cached)" if row["metric"] == "factors" and row["reused"] else ""
        paper = None if theirs is None else paper_value("cost", row["method"], theirs)
        found.setdefault(row["method"], {})[heading] = text if paper is None else f"{text} (paper: {paper:g})"
    wide = pd.DataFrame.from_dict(found, orient="index").rename_axis("Method")
    return wide[[one[0] for one in columns.values() if one[0] in wide]].fillna("–")
