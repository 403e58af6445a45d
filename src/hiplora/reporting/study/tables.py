"""A table as Markdown, LaTeX or HTML, and measurements as CSV or JSON.

A cell reads `12.3 ± 0.4`, or `12.3 [11.8, 12.9]` where it has an interval, and has an en dash where nothing was
measured. The paper's value stands behind it in words ("paper: 12.3"), in every format.
"""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hiplora.errors import ConfigError
from hiplora.reporting.numbers import number
from hiplora.reporting.study.checks import check_table
from hiplora.reporting.study.spec import Cell, Measurement, Table
from hiplora.reporting.study.texts import figure, latex, markdown, one_line, paper_figure, spread

if TYPE_CHECKING:
    from markupsafe import Markup

_COLUMNS = (
    "protocol",
    "method",
    "domain",
    "form",
    "metric",
    "value",
    "unit",
    "low",
    "high",
    "sd",
    "seeds",
    "items",
)


def to_markdown(table: Table) -> str:
    """Return a table as GitHub's Markdown with its title above and its note below; the best are bold.

    Raises:
        ConfigError: a row has more or fewer cells than the table has columns.
    """
    check_table(table)
    lines = [
        f"**{markdown(table.title)}**",
        "",
        _pipes(map(markdown, table.columns)),
        _pipes(["---", *["---:"] * (len(table.columns) - 1)]),
    ]
    for name, cells in table.rows:
        lines.append(_pipes([markdown(name), *map(_markdown_cell, cells)]))
    if table.note:
        lines += ["", markdown(table.note)]
    return "\n".join(lines) + "\n"


def to_latex(table: Table, label: str | None = None) -> str:
    """Return a table as a LaTeX `table` environment in booktabs style, its title and note as the caption.

    The document needs `\\usepackage{booktabs}`. `label` is what `\\ref` uses; `tab:NAME` unless given.

    Raises:
        ConfigError: a row has more or fewer cells than the table has columns.
    """
    check_table(table)
    caption = " ".join(filter(None, (_sentence(latex(table.title)), latex(table.note))))
    lines = [
        r"\begin{table}[htbp]",
        r"\centering",
        rf"\caption{{{caption}}}",
        rf"\label{{{label or f'tab:{table.name}'}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}",
        r"\toprule",
        _ampersands(map(latex, table.columns)),
        r"\midrule",
        *(_ampersands([latex(name), *map(_latex_cell, cells)]) for name, cells in table.rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def to_html(table: Table) -> "Markup":
    """Return a table as an HTML element in a frame that scrolls sideways and that the keyboard reaches.

    Raises:
        ConfigError: a row has more or fewer cells than the table has columns.
    """
    from markupsafe import Markup

    check_table(table)
    head = Markup("").join(
        Markup('<th scope="col"{}>{}</th>').format(Markup(' class="n"') if place else "", name)
        for place, name in enumerate(table.columns)
    )
    body = Markup("\n").join(
        Markup('<tr><th scope="row">{}</th>{}</tr>').format(name, Markup("").join(map(_html_cell, cells)))
        for name, cells in table.rows
    )
    return Markup(
        '<div class="scroll" role="region" aria-label="{}" tabindex="0">\n<table class="study">\n'
        "<thead><tr>{}</tr></thead>\n<tbody>\n{}\n</tbody></table>\n</div>"
    ).format(table.title, head, body)


def measurements_csv(measurements: Sequence[Measurement], provenance: Mapping[str, Any] | None = None) -> str:
    """Return measurements as tidy CSV: a row each, with every part of `setting` and `provenance` a column.

    The columns are the fields of `Measurement`, then `setting.KEY` …, `jobs` (separated by spaces), and the keys of
    `provenance` (nested ones dotted). Numbers are in full precision; what is absent is empty.

    Raises:
        ConfigError: a key of `provenance` is the name of another column.
    """
    columns, rows = _tidy(measurements, provenance or {})
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _csv_value(value) for key, value in row.items()})
    return buffer.getvalue()


def measurements_json(
    measurements: Sequence[Measurement], provenance: Mapping[str, Any] | None = None
) -> str:
    """Return measurements as a JSON list with the rows and columns of `measurements_csv`; `jobs` is a list.

    JSON has no infinity and no NaN: the first is the text "inf" or "-inf", the second null.

    Raises:
        ConfigError: a key of `provenance` is the name of another column.
    """
    rows = [
        {key: _json_value(value) for key, value in row.items()}
        for row in _tidy(measurements, provenance or {})[1]
    ]
    return json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False, default=str) + "\n"


def has_paper(table: Table) -> bool:
    """Say whether a value of the paper stands in a table."""
    return any(number(cell.paper) is not None for _, cells in table.rows for cell in cells)


def _parts(cell: Cell) -> tuple[str, str, str]:
    """Return a cell's number (or dash), its spread and text, and the paper's value; each may be empty."""
    measured = number(cell.value) is not None
    main = figure(cell.value, cell.digits) if measured or not cell.text else one_line(cell.text)
    rest = spread(cell.low, cell.high, cell.sd, cell.digits) if measured else ""
    if measured and cell.text:
        rest += f" {one_line(cell.text)}"
    paper = number(cell.paper)
    if paper is None:
        return main, rest, ""
    low, high, sd = (getattr(cell.paper, name, None) for name in ("low", "high", "sd"))
    return main, rest, f"paper: {paper_figure(paper, cell.digits)}{spread(low, high, sd, cell.digits)}"


def _markdown_cell(cell: Cell) -> str:
    main, rest, paper = _parts(cell)
    shown = f"**{markdown(main)}**" if cell.best else markdown(main)
    return shown + markdown(rest) + (f" *({markdown(paper)})*" if paper else "")


def _latex_cell(cell: Cell) -> str:
    main, rest, paper = _parts(cell)
    shown = rf"\textbf{{{latex(main)}}}" if cell.best else latex(main)
    return shown + latex(rest) + (rf" {{\footnotesize\itshape ({latex(paper)})}}" if paper else "")


def _html_cell(cell: Cell) -> "Markup":
    from markupsafe import Markup

    main, rest, paper = _parts(cell)
    shown = Markup("<strong>{}</strong>" if cell.best else "{}").format(main)
    mark = Markup('<span class="paper">{}</span>').format(paper) if paper else ""
    spread_mark = Markup('<span class="spread">{}</span>').format(rest) if rest else ""
    kind = "t" if cell.text else "n"
    return Markup('<td class="{}">{}{}{}</td>').format(kind, shown, spread_mark, mark)


def _pipes(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _ampersands(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _sentence(text: str) -> str:
    return text if not text or text[-1] in ".?!" else f"{text}."


def _tidy(
    measurements: Sequence[Measurement], provenance: Mapping[str, Any]
) -> tuple[list[str], list[dict[str, Any]]]:
    settings = sorted({f"setting.{key}" for measurement in measurements for key in measurement.setting})
    origin = _dotted(provenance)
    own = [*_COLUMNS, *settings, "jobs"]
    if taken := sorted(set(own) & set(origin)):
        raise ConfigError(
            f"provenance key {taken[0]!r}: is the name of a measurement's column; give it another name"
        )
    rows = []
    for measurement in measurements:
        row = {column: getattr(measurement, column) for column in _COLUMNS}
        row |= {column: measurement.setting.get(column.removeprefix("setting.")) for column in settings}
        rows.append(row | {"jobs": list(measurement.jobs)} | origin)
    return [*own, *origin], rows


def _dotted(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to dotted keys; the values stay as they are."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= _dotted(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def _csv_value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return repr(float(value))
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return str(value)


def _json_value(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(float(value))
    return value
