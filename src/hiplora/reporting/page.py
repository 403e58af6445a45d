"""The report: one HTML page that carries its style and pictures in itself, and the pictures as files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hiplora.files import write_atomic
from hiplora.reporting._old_plots import drift, edits, energy, learning, spectrum
from hiplora.reporting.canvas import Panel, Plate, plate_files
from hiplora.reporting.numbers import MISSING, percent, printable, significant
from hiplora.reporting.palette import looks
from hiplora.reporting.results import Inspection, Results, read_inspection, read_results
from hiplora.reporting.summary import inspection_rows, method_columns, names, sections, tiles
from hiplora.reporting.template import render_page
from hiplora.reporting.verdict import inspection_verdict, verdict


def render_html(results: Mapping[str, Any]) -> str:
    """Render a results dictionary (schema 1, of `compare` or `demo`) as one self-contained HTML page.

    The page has no script and asks for nothing: style and pictures are in it, and its content security policy
    forbids the rest. The same dictionary gives the same bytes.

    Raises:
        DataError: the dictionary is no result, or of another schema.
    """
    read = read_results(results)
    table, styles = sections(read), looks(names(read))
    return render_page(
        "report.html.jinja",
        read.title,
        styles,
        plates(read),
        results=read,
        verdict=verdict(read),
        tiles=tiles(read),
        sections=table,
        columns=method_columns(table),
        types=_type_table(energy.type_rows(_updates(read))),
        settings=settings_table(read.settings, names(read)),
        data=flatten(read.data),
        provenance=flatten(read.provenance),
        exports=[(run.name, str(path)) for run in read.edits if (path := run.export.get("path"))],
    )


def render_inspection_html(inspection: Mapping[str, Any]) -> str:
    """Render an inspection dictionary (schema 1, of `inspect`) as one self-contained HTML page.

    Raises:
        DataError: the dictionary is no inspection, or of another schema.
    """
    read = read_inspection(inspection)
    styles = looks([read.method])
    return render_page(
        "inspection.html.jinja",
        f"Inspection of {read.adapter or 'an adapter'}",
        styles,
        inspection_plates(read),
        inspection=read,
        verdict=inspection_verdict(read),
        facts=inspection_rows(read),
        summary=flatten(read.summary),
        types=_type_table(energy.type_rows({read.method: read.modules})),
        modules=_module_table(read),
    )


def save_report(results: Mapping[str, Any], folder: str | Path) -> Path:
    """Write `report.html` and `figures/*.svg` into `folder`; return the page's path.

    Each file appears whole or not at all.

    Raises:
        DataError: the dictionary is no result, or of another schema.
    """
    page = render_html(results)
    save_figures(results, Path(folder) / "figures")
    return write_atomic(Path(folder) / "report.html", page)


def save_figures(
    results: Mapping[str, Any], folder: str | Path, formats: Sequence[str] = ("svg",)
) -> list[Path]:
    """Write each plate of a result, and `overview` for a README, into `folder`; formats are `svg` and `png`."""
    read = read_results(results)
    paths = []
    for plate in [*plates(read), *overview(read)]:
        for kind, content in plate_files(plate, formats).items():
            paths.append(write_atomic(Path(folder) / f"{plate.name}.{kind}", content))
    return paths


def plates(results: Results) -> list[Plate]:
    """Return the plates of a result in the order of the page; what was not measured is left out."""
    styles, updates = looks(names(results)), _updates(results)
    found = (
        edits.plate(results, styles),
        drift.merged_plate(results.edits, styles),
        learning.plate(results.methods, styles),
        drift.plate(results.methods, styles, merged=bool(results.edits)),
        spectrum.plate(updates, styles),
        energy.plate(updates, styles),
        energy.types_plate(updates, styles),
    )
    return [plate for plate in found if plate is not None]


def overview(results: Results) -> list[Plate]:
    """Return, in a list of at most one, the plate for a README: what was gained beside what it cost elsewhere."""
    styles = looks(names(results))
    if results.edits:
        drifts = {run.name: run.drift for run in results.edits if run.drift}
        panels = [edits.success(results, styles), drift.kl_panel("overview-kl", drifts, {}, styles)]
    else:
        drifts = {method.name: method.drift for method in results.methods if method.drift}
        panels = [learning.curves(results.methods, styles), drift.kl_panel("overview-kl", drifts, {}, styles)]
    shown: list[Panel] = [panel for panel in panels if panel is not None]
    if not shown:
        return []
    legend = {name: styles[name] for name in names(results)}
    return [Plate("overview", results.title, "", shown, legend)]


def inspection_plates(inspection: Inspection) -> list[Plate]:
    """Return the plates of an inspection."""
    updates, styles = {inspection.method: inspection.modules}, looks([inspection.method])
    found = (
        energy.plate(updates, styles),
        spectrum.plate(updates, styles),
        energy.types_plate(updates, styles),
    )
    return [plate for plate in found if plate is not None]


def flatten(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Flatten nested settings into (dotted name, text) pairs, in their order; nothing is shortened."""
    rows: list[tuple[str, str]] = []
    for key, item in value.items():
        name = f"{prefix}{printable(key)}"
        if isinstance(item, Mapping):
            rows += flatten(item, f"{name}.") if item else [(name, "none")]
        elif isinstance(item, Sequence) and not isinstance(item, str | bytes):
            rows.append((name, ", ".join(printable(part) for part in item) or "none"))
        else:
            rows.append((name, MISSING if item is None else printable(item)))
    return rows


def settings_table(settings: Mapping[str, Any], methods: Sequence[str]) -> dict[str, Any]:
    """Return the recipe as a table: one column per method where it is given per method, else one of values.

    `rows` are (name, texts, differs): whether the methods' values differ on that line.
    """
    per_method = {
        name: dict(flatten(settings[name])) for name in methods if isinstance(settings.get(name), Mapping)
    }
    shared = flatten({key: value for key, value in settings.items() if key not in per_method})
    columns = list(per_method) or (["value"] if shared else [])
    rows = [(name, [text] * len(columns), False) for name, text in shared]
    for name in dict.fromkeys(key for values in per_method.values() for key in values):
        texts = [values.get(name, MISSING) for values in per_method.values()]
        rows.append((name, texts, len(set(texts)) > 1))
    return {"columns": columns, "rows": rows}


def _updates(results: Results) -> dict[str, Any]:
    return {method.name: method.modules for method in results.methods if method.modules}


def _type_table(rows: Sequence[energy.TypeRow]) -> list[tuple[str, ...]]:
    return [
        (row.type, row.method, str(row.modules), significant(row.norm), percent(row.left), percent(row.right),
         percent(row.both), percent(row.gain))
        for row in rows
    ]  # fmt: skip


def _module_table(inspection: Inspection) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for row in inspection.modules:
        gains = spectrum.relative_gains([row], row.type)
        largest = percent(max(gains)) if gains else MISSING
        rows.append(
            (row.module, significant(row.norm), percent(row.left), percent(row.right), percent(row.both), largest,
             significant(row.leak))
        )  # fmt: skip
    return rows
