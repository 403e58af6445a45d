"""What each method costs: throughput over steady steps, peak memory, and the one-time cost of its factors (Table 5)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hiplora.recipes.protocols import CostTable
from hiplora.reporting.study.paper import paper_value
from hiplora.reporting.study.spec import Cell, Measurement, Section, Table
from hiplora.study.builder import Study
from hiplora.study.engine.jobs import Job
from hiplora.study.protocols.show import NONE, measurement
from hiplora.study.results import Results
from hiplora.study.statistics import Estimate

NAME, TITLE = "cost", "Cost"


@dataclass(frozen=True)
class Cost:
    """What was timed of a method; `factors` None for methods without."""

    title: str
    job: Job
    tokens_per_second: float
    peak_memory: float | None  # bytes
    factors: tuple[Job, float, float, bool] | None  # job, seconds, bytes, whether they were there already
    machine: str


def jobs(study: Study, settings: CostTable) -> list[Job]:
    """Time every method, and compute the factors of those that have some."""
    found = []
    for method in settings.methods:
        found.append(_speed(study, settings, method))
        if (factors := study.factors(study.row(method))) is not None:
            found.append(factors)
    return found


def section(study: Study, settings: CostTable, results: Results) -> Section:
    """The table of Table 5, with ratios to the first method, measured on one machine."""
    found = [cost for method in settings.methods if (cost := _cost(study, settings, results, method))]
    machines = sorted({cost.machine for cost in found})
    texts = []
    if machines:
        texts.append(
            f"Measured on {'; '.join(machines)}, each method in a process of its own while nothing else of the study "
            f"ran, over {settings.steps} steps after {settings.warmup} to warm up."
        )
    if len(machines) > 1:
        texts.append("Methods were timed on different machines: the ratios below compare those, too.")
    measurements = [one for cost in found for one in _measurements(cost, found[0])]
    return Section(NAME, TITLE, texts, [_table(found)], (), measurements, list(results.missing))


def _speed(study: Study, settings: CostTable, method: str) -> Job:
    """The job that times a method: its training recipe at the study's rate, which changes no time."""
    row = study.row(method)
    trained = study.adapter(row, settings.domain, study.seeds(settings)[0], lr=study.recipe.train.lr)
    asked = {
        "recipe": trained.settings["recipe"],
        "warmup": settings.warmup,
        "steps": settings.steps,
        "files": trained.settings["files"],
    }
    needs = {name: job for name, job in trained.needs.items() if name == "factors"}
    return study.job("speed", f"time {row.title}", asked, **needs)


def _cost(study: Study, settings: CostTable, results: Results, method: str) -> Cost | None:
    row, job = study.row(method), _speed(study, settings, method)
    if results.get(job) is None:
        return None
    timed, factors = results.timing(job) or {}, study.factors(row)
    once = None
    if factors is not None:
        made, took = results.get(factors), results.timing(factors)
        if made is not None and took is not None:
            once = (factors, took["factorize_seconds"], made["bytes"], took["reused"])
    return Cost(
        row.title,
        job,
        timed["tokens_per_second"],
        timed["peak_memory_bytes"],
        once,
        results.machine(job),
    )


def _table(found: list[Cost]) -> Table:
    columns = [
        "Method",
        "Tokens per second",
        "Of the first",
        "Peak memory, GB",
        "SVD minutes",
        "Cache size, GB",
    ]
    rows: list[tuple[str, list[Cell]]] = []
    for cost in found:
        seconds, size = (cost.factors[1], cost.factors[2]) if cost.factors else (None, None)
        memory = cost.peak_memory

        def paper(column: str, title: str = cost.title) -> float | None:
            return paper_value("cost", title, column)

        rows.append(
            (
                cost.title,
                [
                    Cell(cost.tokens_per_second, paper=paper("Tokens per second"), digits=0),
                    Cell(cost.tokens_per_second / found[0].tokens_per_second, digits=3),
                    Cell(None if memory is None else memory / 1e9, paper=paper("Peak memory"), digits=2),
                    NONE if seconds is None else Cell(seconds / 60, paper=paper("SVD minutes"), digits=2),
                    NONE if size is None else Cell(size / 1e9, paper=paper("Cache size"), digits=4),
                ],
            )
        )
    note = (
        "SVD minutes: computing the protected directions once for a base model, calibration included; where they were "
        "in the cache already, the time to verify them. Cache: k(m + n + 1) numbers a matrix."
    )
    return Table(f"{NAME}-table", TITLE, columns, rows, note)


def _measurements(cost: Cost, first: Cost) -> Iterator[Measurement]:
    def one(metric: str, value: float, unit: str, job: Job, **setting: Any) -> Measurement:
        told = {"machine": cost.machine, **setting}
        return measurement(NAME, cost.title, metric, Estimate(value), [job], unit=unit, setting=told)

    yield one("throughput", cost.tokens_per_second, "tokens/s", cost.job)
    ratio = cost.tokens_per_second / first.tokens_per_second
    yield one("throughput ratio", ratio, "ratio", cost.job, over=first.title)
    if cost.peak_memory is not None:
        yield one("peak memory", cost.peak_memory, "bytes", cost.job)
        if first.peak_memory:
            ratio = cost.peak_memory / first.peak_memory
            yield one("peak memory ratio", ratio, "ratio", cost.job, over=first.title)
    if cost.factors is not None:
        job, seconds, size, reused = cost.factors
        yield one("factors", seconds, "seconds", job, reused=reused)
        yield one("cache", size, "bytes", job)
