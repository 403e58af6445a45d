"""The page of a study: what was found in words, then tables and figures, protocol by protocol."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hiplora.reporting.canvas import Plate
from hiplora.reporting.numbers import MISSING, count, number, printable, significant
from hiplora.reporting.study.checks import check_names
from hiplora.reporting.study.describe import Value, data_rows
from hiplora.reporting.study.figures import Styles, plate
from hiplora.reporting.study.paper import paper_model
from hiplora.reporting.study.spec import Figure, Grid, Measurement, Plot, Section
from hiplora.reporting.study.styles import report_styles
from hiplora.reporting.study.tables import has_paper, to_html
from hiplora.reporting.study.texts import NOT_MEASURED, spread
from hiplora.reporting.template import render_page

if TYPE_CHECKING:
    from markupsafe import Markup

_MOST_ROWS = 200  # of one data table on the page; the files have all
_NAMED = 6  # jobs that are waited for: up to so many are named without unfolding
_MEASUREMENT_COLUMNS = ("method", "domain", "form", "metric", "value", "unit", "seeds", "items", "setting")


@dataclass(frozen=True)
class Data:
    """A table of plain texts below a picture; the first `words` columns are no numbers, `left_out` rows in the file."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int
    left_out: int


@dataclass(frozen=True)
class Picture:
    """A figure on the page: its plate, its title where the panels do not have it, its data."""

    plate: Plate
    title: str
    data: Data


@dataclass(frozen=True)
class Shown:
    """A section as the page shows it."""

    section: Section
    tables: Sequence[tuple[str, "Markup", str]]  # title, element, note
    pictures: Sequence[Picture]
    measurements: Data
    open: bool  # whether the list of missing jobs is short enough to be shown at once


def render_study(
    title: str, summary: Mapping[str, Any], sections: Sequence[Section], provenance: Mapping[str, Any]
) -> str:
    """Render a study as one self-contained HTML page: no script, no request, the same input gives the same bytes.

    `summary` has the page's first words: `headline` (a sentence) and `text` (paragraphs), both optional; what else is
    in it is shown as facts (name: value). `provenance` (commit, machine, recipe hash, time …) closes the page.

    Raises:
        ConfigError: names of sections, tables or figures that are no file names or not unique; a table or figure
            whose rows or lists do not fit each other.
    """
    check_names(sections)
    styles = report_styles(sections)
    shown = [_shown(section, styles) for section in sections]
    plates = [picture.plate for part in shown for picture in part.pictures]
    facts = {key: value for key, value in summary.items() if key not in ("headline", "text")}
    text = summary.get("text") or ()
    return render_page(
        "study.html.jinja",
        printable(title),
        styles,
        plates,
        headline=summary.get("headline") or "",
        sentences=[text] if isinstance(text, str) else list(text),
        facts=flatten(facts),
        parts=shown,
        paper=_paper_note(sections),
        provenance=flatten(provenance),
    )


def _shown(section: Section, styles: Styles) -> Shown:
    return Shown(
        section,
        [(table.title, to_html(table), table.note) for table in section.tables],
        [_picture(figure, styles) for figure in section.figures],
        _measurements(section.measurements),
        len(section.missing) <= _NAMED,
    )


def _picture(figure: Figure, styles: Styles) -> Picture:
    columns, rows = data_rows(figure)
    shown = rows[:_MOST_ROWS]
    texts = itertools.takewhile(
        lambda place: all(isinstance(row[place], str) for row in shown), range(len(columns))
    )
    data = Data(columns, [list(map(_text, row)) for row in shown], len(list(texts)), len(rows) - len(shown))
    return Picture(plate(figure, styles), figure.title if isinstance(figure, Grid) else "", data)


def _measurements(measurements: Sequence[Measurement]) -> Data:
    rows = [
        [
            row.method,
            row.domain,
            row.form,
            row.metric,
            _text(number(row.value)) + spread(row.low, row.high, row.sd, 2),
            row.unit,
            count(row.seeds),
            "" if row.items is None else count(row.items),
            ", ".join(f"{key} {printable(value)}" for key, value in row.setting.items()),
        ]
        for row in measurements[:_MOST_ROWS]
    ]
    kept = [
        place for place in range(len(_MEASUREMENT_COLUMNS)) if any(row[place] for row in rows)
    ]  # columns that say nothing are left out
    return Data(
        [_MEASUREMENT_COLUMNS[place] for place in kept],
        [[row[place] for place in kept] for row in rows],
        sum(place < _MEASUREMENT_COLUMNS.index("value") for place in kept),
        len(measurements) - len(rows),
    )


def _text(value: Value) -> str:
    if value is None:
        return NOT_MEASURED
    if isinstance(value, str):
        return printable(value)
    text = significant(value, 4)
    return text.rstrip("0").rstrip(".") if "." in text and "×" not in text else text


def _paper_note(sections: Sequence[Section]) -> str:
    tables = any(has_paper(table) for section in sections for table in section.tables)
    figures = any(series.paper for plot in _plots(sections) for series in plot.series)
    if not tables and not figures:
        return ""
    return (
        f"Values marked “paper” are what the HiP-LoRA paper reports for {paper_model()}: they were not measured here. "
        "Everything else was."
    )


def _plots(sections: Sequence[Section]) -> Iterator[Plot]:
    for section in sections:
        for figure in section.figures:
            parts = figure.parts if isinstance(figure, Grid) else [figure]
            yield from (part for part in parts if isinstance(part, Plot))


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
