"""What each method costs: throughput over steady steps, peak memory, and the one-time cost of its factors (Table 5)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hiplora.recipes.protocols import CostTable
from hiplora.reporting.study.paper import paper_value
from hiplora.reporting.study.spec import Cell, Measurement, Section, Table
from hiplora.study.builder import Study
from hiplora.study.engine.jobs import Job
from hiplora.study.protocols.show import NONE, measurement
from hiplora.study.results import Results
from hiplora.study.statistics import Estimate, student

NAME, TITLE = "cost", "Cost"


@dataclass(frozen=True)
class Cost:
    """What was timed of a method, once or in turn with the others; `factors` None for methods without."""

    title: str
    jobs: list[Job]
    speeds: list[float]  # tokens per second, each time
    peak_memory: float | None  # bytes
    factors: tuple[Job, float, float, bool] | None  # job, seconds, bytes, whether they were there already
    machine: str

    @property
    def tokens_per_second(self) -> float:
        """The mean over the times."""
        return sum(self.speeds) / len(self.speeds)


def jobs(study: Study, settings: CostTable) -> list[Job]:
    """Time every method, all of them as often as is asked for in turn, and compute the factors of those with some."""
    found = [
        _speed(study, settings, method, n) for n in range(settings.repeats) for method in settings.methods
    ]
    factors = [study.factors(study.row(method)) for method in settings.methods]
    return [*found, *(job for job in factors if job is not None)]


def section(study: Study, settings: CostTable, results: Results) -> Section:
    """The table of Table 5, with ratios to the first method that is named, measured on one machine."""
    costs = {method: _cost(study, settings, results, method) for method in settings.methods}
    found = [cost for cost in costs.values() if cost is not None]
    first = costs[settings.methods[0]]
    measurements = [one for cost in found for one in _measurements(cost, first)]
    table = _table(found, first, study.row(settings.methods[0]).title)
    return Section(
        NAME, TITLE, list(_texts(settings, found, first)), [table], (), measurements, list(results.missing)
    )


def _texts(settings: CostTable, found: Sequence[Cost], first: Cost | None) -> Iterator[str]:
    machines = sorted({cost.machine for cost in found})
    if machines:
        yield (
            f"Measured on {'; '.join(machines)}, each method in a process of its own while nothing else of the study "
            f"ran, over {settings.steps} steps after {settings.warmup} to warm up, {_times(settings.repeats)} "
            "Decompositions were timed as jobs among others."
        )
    if len(machines) > 1:
        yield "Methods were timed on different machines: the ratios below compare those, too."
    if first is not None and len(found) > 1:
        others = [(cost.title, _speed_ratio(cost, first)) for cost in found if cost is not first]
        told = ", ".join(f"{title} {speed.value:.3f}" for title, speed in others)
        yield f"Tokens per second, as a share of {first.title}'s: {told}.{_told_from_none(others)}"


def _times(repeats: int) -> str:
    if repeats == 1:
        return "once: there are no intervals."
    return f"{repeats} times in turn with the others; intervals are Student's t over the times."


def _told_from_none(ratios: Sequence[tuple[str, Estimate]]) -> str:
    """The smallest difference that can be told; nothing where nothing was timed twice."""
    halves = [ratio.half for _, ratio in ratios if ratio.half is not None]
    if not halves:
        return ""
    return f" A difference to it can be told if it is larger than about {float(np.median(halves)):.3f}."


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


def _cost(study: Study, settings: CostTable, results: Results, method: str) -> Cost | None:
    row, timed = study.row(method), [_speed(study, settings, method, n) for n in range(settings.repeats)]
    if None in [results.get(job) for job in timed]:
        return None
    timings, factors = [results.timing(job) or {} for job in timed], study.factors(row)
    once = None
    if factors is not None:
        made, took = results.get(factors), results.timing(factors)
        if made is not None and took is not None:
            once = (factors, took["factorize_seconds"], made["bytes"], took["reused"])
    memory = [found["peak_memory_bytes"] for found in timings if found["peak_memory_bytes"] is not None]
    return Cost(
        row.title,
        timed,
        [found["tokens_per_second"] for found in timings],
        max(memory, default=None),
        once,
        ", ".join(filter(None, (timings[0].get("gpu"), results.machine(timed[0])))),
    )


def _table(found: Sequence[Cost], first: Cost | None, first_title: str) -> Table:
    columns = [
        *("Method", "Tokens per second", f"Of {first_title}'s"),
        *("Peak memory, GB", f"Of {first_title}'s memory", "SVD minutes", "Cache size, GB"),
    ]
    rows = [(cost.title, _cells(cost, first)) for cost in found]
    note = (
        "SVD minutes: computing the protected directions once for a base model, calibration included; where they were "
        "in the cache already, the time to verify them, marked as cached; the decomposition is this "
        "project's certified one, the paper's a randomized one. Cache: k(m + n + 1) numbers a matrix."
    )
    return Table(f"{NAME}-table", TITLE, columns, rows, note)


def _cells(cost: Cost, first: Cost | None) -> list[Cell]:
    def paper(column: str) -> float | None:
        return paper_value("cost", cost.title, column)

    memory, speed_ratio, memory_ratio = cost.peak_memory, *_ratios(cost, first)
    speed = (
        Cell()
        if speed_ratio is None
        else Cell(speed_ratio.value, speed_ratio.low, speed_ratio.high, digits=3)
    )
    shown = [
        Cell(cost.tokens_per_second, paper=paper("Tokens per second"), digits=0),
        speed,
        Cell(None if memory is None else memory / 1e9, paper=paper("Peak memory"), digits=2),
        Cell(None if memory_ratio is None else memory_ratio.value, digits=3),
    ]
    if cost.factors is None:
        return [*shown, NONE, NONE]
    _, seconds, size, reused = cost.factors
    told = "(cached)" if reused else ""
    return [
        *shown,
        Cell(seconds / 60, paper=paper("SVD minutes"), digits=2, text=told),
        Cell(size / 1e9, paper=paper("Cache size"), digits=4),
    ]


def _ratios(cost: Cost, first: Cost | None) -> tuple[Estimate | None, Estimate | None]:
    """Throughput and peak memory over the first method's; None while that is missing, or memory unknown."""
    if first is None:
        return None, None
    memory = (
        Estimate(cost.peak_memory / first.peak_memory) if cost.peak_memory and first.peak_memory else None
    )
    return _speed_ratio(cost, first), memory


def _speed_ratio(cost: Cost, first: Cost) -> Estimate:
    """Throughput over the first method's, mean over the times that they were timed in turn."""
    ratios = [here / there for here, there in zip(cost.speeds, first.speeds, strict=True)]
    found = student(ratios)
    return Estimate(found.value, found.low, found.high)


def _measurements(cost: Cost, first: Cost | None) -> Iterator[Measurement]:
    def one(metric: str, value: float, unit: str, used: list[Job], **setting: Any) -> Measurement:
        told = {"machine": cost.machine, **setting}
        return measurement(NAME, cost.title, metric, Estimate(value), used, unit=unit, setting=told)

    speed_ratio, memory_ratio = _ratios(cost, first)
    yield one("throughput", cost.tokens_per_second, "tokens/s", cost.jobs)
    if cost.peak_memory is not None:
        yield one("peak memory", cost.peak_memory, "bytes", cost.jobs)
    for metric, ratio in (("throughput ratio", speed_ratio), ("peak memory ratio", memory_ratio)):
        if first is not None and ratio is not None:
            told = {"machine": cost.machine, "over": first.title}
            used = [*cost.jobs, *first.jobs]
            yield measurement(NAME, cost.title, metric, ratio, used, unit="ratio", setting=told)
    if cost.factors is not None:
        job, seconds, size, reused = cost.factors
        yield one("factors", seconds, "seconds", [job], reused=reused)
        yield one("cache", size, "bytes", [job])
