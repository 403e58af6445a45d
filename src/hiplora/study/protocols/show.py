"""What the protocols' sections share: cells and measurements from estimates, words for the forms of a score."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hiplora.provenance import provenance
from hiplora.reporting.study.spec import Cell, Measurement
from hiplora.study.engine.jobs import Job
from hiplora.study.statistics import Draws, Estimate, estimate

NONE = Cell()
_PAPER_COLUMNS = {
    "mmlu": "MMLU",
    "scienceqa": "ScienceQA",
    "gsm8k": "GSM8K",
    "gsm8k_solution": "GSM8K",
    "humaneval": "HumanEval",
    "humaneval_10": "HumanEval",
}
Side = tuple[str, Draws, Sequence[Job]]  # a method, its value with replicates, and what it is made of


def cell(found: Estimate | None, paper: float | None = None, digits: int = 1) -> Cell:
    """Return a table's cell: the value with spread and interval; where there is none yet, only the paper's."""
    if found is None:
        return Cell(paper=paper, digits=digits)
    return Cell(found.value, found.low, found.high, found.sd, paper, digits=digits)


def marked(rows: Sequence[tuple[str, list[Cell]]], best: Mapping[int, str]) -> list[tuple[str, list[Cell]]]:
    """Mark the best cell of some columns: place of the cell → `high` or `low`."""
    rows = [(name, list(cells)) for name, cells in rows]
    for place, prefer in best.items():
        values = [cells[place].value for _, cells in rows]
        known = [value for value in values if value is not None]
        if len(set(known)) < 2:
            continue
        top = max(known) if prefer == "high" else min(known)
        for (_, cells), value in zip(rows, values, strict=True):
            if value == top:
                cells[place] = replace(cells[place], best=True)
    return rows


def measurement(
    protocol: str,
    method: str,
    metric: str,
    found: Estimate,
    jobs: Iterable[Job],
    *,
    wide: Estimate | None = None,
    **fields: Any,
) -> Measurement:
    """Return a row of the tidy tables. `wide` is the paper's hierarchical interval, `fields` as of `Measurement`."""
    setting = dict(fields.pop("setting", {}))
    if wide is not None:
        setting |= {"hierarchical_low": wide.low, "hierarchical_high": wide.high}
    return Measurement(
        protocol,
        method,
        metric,
        found.value,
        low=found.low,
        high=found.high,
        sd=found.sd,
        setting=setting,
        jobs=tuple(dict.fromkeys(job.key for job in jobs)),
        **fields,
    )


def difference(
    protocol: str,
    metric: str,
    here: Side,
    there: Side,
    unit: str = "pp",
    by_seed: tuple[Sequence[float], Sequence[float]] = ((), ()),
    **fields: Any,
) -> Measurement:
    """Return the measurement of a paired difference, in percentage points unless told: `here` minus `there`.

    `by_seed` has the two sides' values seed after seed: the spread of their differences goes into the measurement.
    """
    setting = {"minus": there[0], **fields.pop("setting", {})}
    found = estimate(here[1] - there[1], np.subtract(by_seed[0], by_seed[1]).tolist())
    used = [*here[2], *there[2]]
    return measurement(
        protocol, here[0], f"{metric} difference", found, used, unit=unit, setting=setting, **fields
    )


def smallest(values: Sequence[Draws]) -> float | None:
    """Return the smallest difference between two of some values that can be told from none: the median half width of
    the intervals of all pairs' differences; None for fewer than two.
    """
    pairs = [(a, b) for place, a in enumerate(values) for b in values[place + 1 :]]
    return float(np.median([estimate(a - b).half or 0.0 for a, b in pairs])) if pairs else None


def smallest_told(values: Sequence[Draws], unit: str = "pp") -> str:
    """Say the smallest difference between two of some values that can be told from none; as `smallest`."""
    least = smallest(values)
    if least is None:
        return ""
    if least == 0:
        return "The items do not differ among themselves, so their intervals do not say what could be told from none."
    return f"A difference between two methods can be told from none if it is larger than about {least:.1f} {unit}."


def counted(words: Iterable[str]) -> str:
    """Say how often each of some words comes: `3 met, 2 missed`."""
    return ", ".join(f"{count} {word}" for word, count in Counter(words).items())


def verdict_file(what: str, found: Mapping[str, Any]) -> dict[str, str]:
    """Return the file WHAT.json of a report: what was judged, by names, and where that comes from."""
    told = {what: found, "provenance": provenance()}
    return {f"{what}.json": json.dumps(told, indent=1, ensure_ascii=False) + "\n"}


def paper_column(task: str) -> str:
    """Return the name that the paper's tables give a task's column."""
    return _PAPER_COLUMNS.get(task, task)


def form_told(form: str) -> str:
    """Say what a score of a form is."""
    if form == "accuracy":
        return (
            "Accuracy, pass rate or exact match (of a reference text: all of it, word for word), in per cent"
        )
    return "Likelihood of the right answer, in per cent"
