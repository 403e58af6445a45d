"""A study's report: tables, figures, tidy measurements, one page, and the records that it was made from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from hiplora.errors import ConfigError
from hiplora.files import check_output_dir, staged_dir, write_atomic
from hiplora.provenance import json_sha256, provenance
from hiplora.reporting import save_table
from hiplora.reporting.html import Section, save_page
from hiplora.reporting.plots import save_figure
from hiplora.study.builder import Study
from hiplora.study.protocols import sections
from hiplora.study.records import Findings, joined, paper

_FIRST = ["protocol", "method", "metric", "domain", "form", "estimate", "low", "high", "sd", "seeds", "items", "unit"]


def report(study: Study, out: str | Path, overwrite: bool = False) -> dict[str, Any]:
    """Write what a study found so far into the folder `out`; return the page's place and what is still missing.

    The folder holds report.html, tables/NAME.{csv,md,tex}, figures/NAME.svg, measurements.csv (a row a number),
    claims.json, and records.jsonl.gz, every job's record, from which `hiplora study run --reuse` goes on elsewhere.
    ConfigError if `out` exists and `overwrite` is False, it is or holds what the study reads, or no job is done.
    """
    graph, store, recipe, data = study.graph, study.store, study.recipe, study.place.data
    files = study.files if data in Path(out).resolve().parents else [data]  # a folder of data may hold reports
    inputs: dict[str, Any] = {f"the study's {name}": store.path / name for name in ("results", "artifacts")}
    inputs |= {"the base model": study.place.model, **{f"the study's data, {file}": file for file in files}}
    check_output_dir(out, overwrite, inputs, "--to")
    records = [record for job in graph if (record := store.record(job)) is not None]
    if not records:
        raise ConfigError(f"study {recipe.study}: none of its {len(graph)} jobs is done in {store.path}; run it first")
    protocols = sections(study)
    numbers = measurements(protocols)
    seconds = sum(record["timing"].get("seconds") or 0 for record in records)
    subtitle = (
        f"{len(records):,} of {len(graph):,} jobs are done, {seconds / 3600:.1f} hours of work. Model {recipe.model}, "
        f"seeds {', '.join(map(str, recipe.seeds))}. Values marked as the paper's are of {paper()['model']}."
    )
    origin = {
        "report": provenance(),
        "recipe_sha256": json_sha256(recipe.model_dump(mode="json", exclude_defaults=True)),
        "commits of the jobs": sorted({str(record["provenance"]["commit"]) for record in records}),
        "machines": sorted({str(record["provenance"]["machine"]["processor"]) for record in records}),
    }
    with staged_dir(out, overwrite) as folder:
        for findings in protocols:
            for name, (_, frame) in findings.tables.items():
                save_table(frame, folder / "tables" / name)
            for name, (_, figure) in findings.figures.items():
                save_figure(figure, folder / "figures" / name)
            for name, text in findings.files.items():
                write_atomic(folder / name, text)
        write_atomic(folder / "measurements.csv", numbers.to_csv(index=False, float_format="%.6g"))
        store.export(graph, folder / "records.jsonl.gz")
        title = recipe.title or recipe.study
        save_page(folder / "report.html", title, [_section(findings) for findings in protocols], subtitle, origin)
    return {
        "page": str(Path(out) / "report.html"),
        "sections": {findings.name: len(findings.missing) for findings in protocols},
        "jobs": len(graph),
        "left": len(graph) - len(records),
        "measurements": len(numbers),
    }


def measurements(protocols: Sequence[Findings]) -> pd.DataFrame:
    """Return every measured number as one table; labels that only some protocols have come last."""
    numbers = joined(*(findings.measured.assign(protocol=findings.name) for findings in protocols), columns=_FIRST)
    return numbers[[*_FIRST, *numbers.columns.difference(_FIRST, sort=False)]]


def _section(findings: Findings) -> Section:
    text, missing = findings.text, findings.missing
    if missing:
        names = "; ".join(missing[:5]) + (" …" if len(missing) > 5 else "")
        text += f"\n\n{len(missing)} jobs are not done yet: {names}"
    return Section(findings.title, text, dict(findings.tables.values()), dict(findings.figures.values()))
