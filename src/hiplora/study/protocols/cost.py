"""What each method costs: throughput over steady steps, peak memory, and the one-time cost of its factors (Table 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd
from pydantic import Field

from hiplora.study.protocols.settings import OfMethods, Positive
from hiplora.study.records import Findings, joined, paper_value, table
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
    timed = [_speed(study, settings, method, n) for n in range(settings.repeats) for method in settings.methods]
    factors = [study.factors(study.row(method)) for method in settings.methods]
    return [*timed, *(job for job in factors if job is not None)]


def tables(study: Study, settings: CostTable, results: Results) -> Findings:
    """Return throughput and memory, with ratios to the first method that is named, and the cost of the factors."""
    found = Findings(settings.name, settings.title, _measured(study, settings, results))
    machines = []
    if len(found.measured):
        first = study.row(settings.methods[0]).title
        found.tables[f"{settings.name}-table"] = settings.title, _table(found.measured, first)
        machines = sorted(found.measured.machine.unique())
    found.text = (
        f"Measured on {'; '.join(machines) or '–'}, each method in a process of its own while nothing else of the "
        f"study ran, over {settings.steps} steps after {settings.warmup} to warm up, {settings.repeats} times in turn; "
        "intervals are Student's t over the times. Factors: computing the protected directions once for a base model, "
        "calibration included, or verifying them where they were cached. Cache: k(m + n + 1) numbers a matrix."
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


def _measured(study: Study, settings: CostTable, results: Results) -> pd.DataFrame:
    """Speeds in tokens per second, peak memory in bytes, both compared with the first method's, and the factors."""
    rows: list[dict[str, Any]] = []
    first = None
    for method in settings.methods:
        row, factors = study.row(method), study.factors(study.row(method))
        timed = [_speed(study, settings, method, n) for n in range(settings.repeats)]
        if None in [results.get(job) for job in timed]:
            continue
        times = pd.DataFrame([results.timing(job) for job in timed])
        speed, memory = times.tokens_per_second, times.peak_memory_bytes.astype(float).max()
        first = (speed, memory) if method == settings.methods[0] else first
        machine = ", ".join(filter(None, (times.gpu[0], results.machine(timed[0]))))
        label = {"method": row.title, "machine": machine, "jobs": " ".join(job.key[:8] for job in timed)}
        rows.append({**label, "metric": "throughput", "estimate": speed.mean(), "unit": "tokens/s"})
        rows.append({**label, "metric": "peak memory", "estimate": memory, "unit": "bytes"})
        if first is not None:
            # The methods were timed in turn: the n-th times are compared with each other.
            over = {**label, "over": study.row(settings.methods[0]).title, "unit": "ratio"}
            ratio = student(pd.concat({0: speed / first[0]}, names=["of", "seed"])).iloc[0]
            rows.append({**over, "metric": "throughput ratio", **ratio[["estimate", "low", "high"]]})
            rows.append({**over, "metric": "peak memory ratio", "estimate": memory / first[1]})
        if factors is not None and (made := results.get(factors)) is not None:
            timing = results.timing(factors) or {}
            label["jobs"] = factors.key[:8]
            seconds = {"estimate": timing["factorize_seconds"], "unit": "seconds", "reused": timing["reused"]}
            rows.append({**label, "metric": "factors", **seconds})
            rows.append({**label, "metric": "cache", "estimate": made["bytes"], "unit": "bytes"})
    return joined(pd.DataFrame(rows), columns=["estimate", "low", "high"]).dropna(subset="estimate")


def _table(numbers: pd.DataFrame, first: str) -> pd.DataFrame:
    columns = [
        ("throughput", "Tokens per second", 1, 0),
        ("throughput ratio", f"Of {first}'s", 1, 3),
        ("peak memory", "Peak memory, GB", 1e9, 2),
        ("peak memory ratio", f"Of {first}'s memory", 1, 3),
        ("factors", "SVD minutes", 60, 2),
        ("cache", "Cache size, GB", 1e9, 4),
    ]
    shown = pd.DataFrame(columns, columns=["metric", "column", "scale", "digits"]).merge(numbers, on="metric")
    bounds = ["estimate", "low", "high"]
    shown[bounds] = shown[bounds].div(shown.scale, axis=0)
    wide = table(
        shown,
        "column",
        digits=lambda row: row.digits,
        paper=lambda row: paper_value("cost", row.method, row.column.partition(",")[0]),
    )
    cached = [row["method"] for row in numbers.to_dict("records") if row.get("reused") is True]
    if cached:
        wide.loc[cached, "SVD minutes"] += " (cached)"
    return wide
