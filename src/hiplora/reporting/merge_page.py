"""The page of a merge report: where the adapters meet, what cancels and, where it was measured, what broke."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hiplora.files import write_atomic
from hiplora.reporting._old_plots import broken, conflict
from hiplora.reporting.canvas import Plate
from hiplora.reporting.merge_results import MergeReport, read_merge_report
from hiplora.reporting.merge_summary import (
    MEASURED,
    MODULE_COLUMNS,
    TASK_COLUMNS,
    UNRELATED,
    WORST_COLUMNS,
    module_rows,
    task_rows,
    tiles,
    verdict,
    worst_rows,
)
from hiplora.reporting.numbers import count, significant
from hiplora.reporting.page import flatten
from hiplora.reporting.palette import LOOKS, NEUTRAL
from hiplora.reporting.template import render_page


def render_merge_html(report: Mapping[str, Any]) -> str:
    """Render a merge report (schema 1, of `merge_report`) as one self-contained HTML page.

    With `evaluation` in it (see `hiplora.reporting.merge_results`) the page begins with what the merge broke. No
    script, no request; the same dictionary gives the same bytes.

    Raises:
        DataError: the dictionary is no merge report, or of another schema.
    """
    read = read_merge_report(report)
    return render_page(
        "merge.html.jinja",
        f"Merge of {len(read.adapters)} adapter{'s' if len(read.adapters) != 1 else ''}",
        {MEASURED: LOOKS[0], UNRELATED: NEUTRAL},
        merge_plates(read),
        report=read,
        verdict=verdict(read),
        tiles=tiles(read),
        tasks=(TASK_COLUMNS, task_rows(read.evaluation.tasks)),
        worst=(WORST_COLUMNS, worst_rows(read)),
        modules=(MODULE_COLUMNS, module_rows(read.modules)),
        adapters=_adapter_rows(read),
        facts=flatten(_without_rows(read.merge)) + flatten(read.settings),
        provenance=flatten(read.provenance),
    )


def save_merge_html(report: Mapping[str, Any], path: str | Path) -> Path:
    """Write the page of a merge report to `path`, whole or not at all; return the path.

    Raises:
        DataError: as `render_merge_html`.
    """
    return write_atomic(path, render_merge_html(report))


def merge_plates(report: MergeReport) -> list[Plate]:
    """Return the plates of a merge report in the order of the page; what was not measured is left out."""
    found = (
        broken.plate(report.evaluation),
        conflict.where_plate(report),
        conflict.pairs_plate(report),
        conflict.cancels_plate(report),
    )
    return [plate for plate in found if plate is not None]


def _adapter_rows(report: MergeReport) -> list[tuple[str, ...]]:
    return [
        (str(place), adapter.name, adapter.method, significant(adapter.weight), count(adapter.modules))
        for place, adapter in enumerate(report.adapters, 1)
    ]


def _without_rows(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record without its lists of records, such as one for each module, which are tables of their own."""
    kept: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            kept[key] = _without_rows(value)
        elif not (isinstance(value, Sequence) and any(isinstance(item, Mapping) for item in value)):
            kept[key] = value
    return kept
