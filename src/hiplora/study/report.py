"""A study's report: tables, figures, tidy measurements, one page, and the records that it was made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hiplora.provenance import json_sha256, provenance
from hiplora.reporting.study.write import write_report
from hiplora.study.engine.store import export
from hiplora.study.plan import open_jobs
from hiplora.study.protocols import files, sections
from hiplora.study.results import Results
from hiplora.study.running import Opened

RECORDS = "records.jsonl.gz"


def report(opened: Opened, out: str | Path, overwrite: bool = False) -> dict[str, Any]:
    """Write what a study found so far into the folder `out`; return the page's place and what is still missing.

    Beside what `write_report` and the protocols write there is `records.jsonl.gz`, every job's record: `Store.take`
    reads it, and the study goes on from it on another machine.

    Raises:
        ConfigError: `out` exists and `overwrite` is False.
    """
    graph, store, recipe = opened.graph, opened.store, opened.study.recipe
    found = sections(opened.study, Results(store))
    left = open_jobs(graph, store)
    records = [record for job in graph if (record := store.record(job)) is not None]
    summary: dict[str, Any] = {
        "headline": f"{len(records):,} of {len(graph):,} jobs are done."
        if left
        else f"All {len(graph):,} jobs are done.",
        "model": recipe.model,
        "seeds": ", ".join(map(str, recipe.seeds)),
        "tokens trained on": f"{sum(r['result'].get('tokens') or 0 for r in records if r['kind'] == 'train'):,}",
        "hours of work": f"{sum(r['timing'].get('seconds') or 0 for r in records) / 3600:.1f}",
    }
    page = write_report(
        out,
        recipe.title or recipe.study,
        summary,
        found,
        _origin(opened, records),
        overwrite,
        files=files(opened.study, Results(store), found),
    )
    export(store, graph, Path(out) / RECORDS)
    return {
        "page": str(page),
        "sections": {section.name: len(section.missing) for section in found},
        "jobs": len(graph),
        "left": len(left),
        "measurements": sum(len(section.measurements) for section in found),
    }


def _origin(opened: Opened, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Where the numbers come from: the recipe, its data, and whatever commits and machines did the jobs."""
    recipe = opened.study.recipe.model_dump(mode="json", exclude_defaults=True)
    files = {name: value for job in opened.graph for name, value in _files(job.settings)}
    origins = [record["provenance"] for record in records]
    return {
        "report": provenance(),
        "recipe_sha256": json_sha256(recipe),
        "data": {name: files[name] for name in sorted(files)},
        "jobs": {
            "commits": sorted({str(origin["commit"]) for origin in origins}),
            "machines": sorted(
                {f"{o['machine']['processor']}, {o['machine']['cores']} cores" for o in origins}
            ),
            "libraries": {
                name: ", ".join(sorted({str(origin["libraries"].get(name)) for origin in origins}))
                for name in sorted({name for origin in origins for name in origin["libraries"]})
            },
            "first": min((origin["time"] for origin in origins), default=None),
            "last": max((origin["time"] for origin in origins), default=None),
        },
    }


def _files(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, digest in (settings.get("files") or {}).items():
        if digest is not None:
            yield name, digest
