"""What the protocols' sections share: cells and measurements from estimates, words for the forms of a score."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hiplora.reporting.study.spec import Cell, Measurement
from hiplora.study.engine.jobs import Job
from hiplora.study.statistics import Estimate

NONE = Cell()


def cell(found: Estimate | None, paper: float | None = None, digits: int = 1) -> Cell:
    """Return a table's cell: the value with its interval; where there is none yet, only the paper's."""
    if found is None:
        return Cell(paper=paper, digits=digits)
    return Cell(found.value, found.low, found.high, None, paper, digits=digits)


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
