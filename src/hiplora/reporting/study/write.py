"""The folder of a study's report: data, tables, figures and the page, all there or not at all."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hiplora.files import check_output_dir, staged_dir, write_atomic
from hiplora.reporting.study.figures import save
from hiplora.reporting.study.page import render_study
from hiplora.reporting.study.spec import Section
from hiplora.reporting.study.styles import report_styles
from hiplora.reporting.study.tables import measurements_csv, measurements_json, to_latex, to_markdown


def write_report(
    out: str | Path,
    title: str,
    summary: Mapping[str, Any],
    sections: Sequence[Section],
    provenance: Mapping[str, Any],
    overwrite: bool = False,
    files: Mapping[str, str] | None = None,
) -> Path:
    """Write a study's report into the folder `out`; return the page's path, `out/report.html`.

    Beside the page are `measurements.csv` and `measurements.json` (all sections' measurements, a row each),
    `tables/NAME.md` and `.tex`, `figures/NAME.svg`, `.pdf` and `.csv` (the figure's data), and `files`, texts by their
    names in the folder. The same input gives the same bytes. `summary` and `provenance` are those of `render_study`.

    Raises:
        ConfigError: `out` exists and `overwrite` is False; or as `render_study` and `measurements_csv`.
    """
    check_output_dir(out, overwrite)
    page = render_study(title, summary, sections, provenance)
    measurements = [measurement for section in sections for measurement in section.measurements]
    styles = report_styles(sections)
    with staged_dir(out, overwrite) as folder:
        write_atomic(folder / "measurements.csv", measurements_csv(measurements, provenance))
        write_atomic(folder / "measurements.json", measurements_json(measurements, provenance))
        for table in (table for section in sections for table in section.tables):
            write_atomic(folder / "tables" / f"{table.name}.md", to_markdown(table))
            write_atomic(folder / "tables" / f"{table.name}.tex", to_latex(table))
        for figure in (figure for section in sections for figure in section.figures):
            save(figure, folder / "figures", styles)
        for name, text in (files or {}).items():
            write_atomic(folder / name, text)
        write_atomic(folder / "report.html", page)
    return Path(out) / "report.html"
