import csv
import io
import json
import math
import re

import pytest

from hiplora.errors import ConfigError
from hiplora.reporting.study.paper import paper_value
from hiplora.reporting.study.spec import Cell, Table
from hiplora.reporting.study.tables import measurements_csv, measurements_json, to_html, to_latex, to_markdown
from hiplora.reporting.study.texts import figure, latex, paper_figure
from tests.unit.reporting.study import study_samples as samples


def one(cell, **changes):
    values = {"name": "t", "title": "T", "columns": ["Method", "Score"], "rows": [("LoRA", [cell])]}
    return Table(**(values | changes))


def markdown_cell(cell):
    return to_markdown(one(cell)).splitlines()[-1].split(" | ")[1].removesuffix(" |").replace("\u00a0", " ")


def latex_cell(cell):
    line = next(line for line in to_latex(one(cell)).splitlines() if line.startswith("LoRA"))
    return line.removeprefix("LoRA & ").removesuffix(r" \\")


def html_cell(cell):
    return re.search(r'<td class="n">(.*)</td>', to_html(one(cell))).group(1).replace("\u00a0", " ")


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        (Cell(12.34, sd=0.42), "12.3 ± 0.4"),
        (Cell(12.34, low=11.0, high=13.0, sd=0.42), r"12.3 ± 0.4 \[11.0, 13.0\]"),
        (Cell(3.1, paper=paper_value("single-task", "HiP-LoRA", "Retain")), "3.1 *(paper: 4.9 ± 0.6)*"),
        (
            Cell(0.7, digits=2, paper=paper_value("rank-one", "Zero", "Pearson")),
            r"0.70 *(paper: 0.856 \[0.14, 0.95\])*",
        ),
        (Cell(12.34, low=11.84, high=12.9, digits=2), r"12.34 \[11.84, 12.90\]"),
        (Cell(), "–"),
        (Cell(math.nan, low=1.0, high=2.0), "–"),
        (Cell(math.inf), "∞"),
        (Cell(-0.04, digits=1), "−0.0400"),
        (Cell(-0.0), "0.0"),
        (Cell(42000, digits=0), "42,000"),
        (Cell(text="not run"), "not run"),
        (Cell(3.0, sd=0.1, text="(2 of 3)"), "3.0 ± 0.1 (2 of 3)"),
        (Cell(3.0, best=True, sd=0.1), "**3.0** ± 0.1"),
        (Cell(4.0, paper=12.3), "4.0 *(paper: 12.3)*"),
        (Cell(paper=20.24), "– *(paper: 20.24)*"),
    ],
)
def test_markdown_writes_value_spread_and_the_papers_value_as_such(cell, words):
    assert markdown_cell(cell) == words


def test_the_best_is_bold_in_every_format_and_the_papers_value_is_not():
    cell = Cell(4.0, best=True, paper=4.9)
    assert markdown_cell(cell) == "**4.0** *(paper: 4.9)*"
    assert latex_cell(cell) == r"\textbf{4.0} {\footnotesize\itshape (paper: 4.9)}"
    assert html_cell(cell) == '<strong>4.0</strong><span class="paper">paper: 4.9</span>'


def test_what_was_not_measured_is_a_dash_in_every_format_even_beside_a_paper_value():
    cell = Cell(paper=12.3)
    assert latex_cell(cell).startswith("-- {")
    assert html_cell(cell).startswith("–<span")


def test_the_papers_value_keeps_the_digits_that_the_paper_gives():
    assert paper_figure(20.24, 1) == "20.24"
    assert paper_figure(62.0, 1) == "62.0"
    assert paper_figure(42000.0, 0) == "42,000"
    assert paper_figure(3.09e-9, 3) == "3.09\u00a0×\u00a010⁻⁹"


def test_a_number_too_small_for_its_digits_is_not_written_as_zero():
    assert figure(0.004, 1) == "0.00400"
    assert figure(0.0, 1) == "0.0"


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("50 % & #1 of $x_i${}", r"50 \% \& \#1 of \$x\_i\$\{\}"),
        (r"a\b ~ ^", r"a\textbackslash{}b \textasciitilde{} \textasciicircum{}"),
        ("| < >", r"\textbar{} \textless{} \textgreater{}"),
        ("λ ± δ → Δ ≤ ∞ −1", r"$\lambda$ $\pm$ $\delta$ $\rightarrow$ $\Delta$ $\leq$ $\infty$ $-$1"),
        ("[0.1, 0.2]*", "{[}0.1, 0.2{]}{*}"),
        ("3·10⁻⁹ – x…", r"3$\cdot$10$^{-9}$ -- x\dots{}"),
        ("two\nlines\t\x00", "two lines "),
    ],
)  # fmt: skip
def test_latex_escapes_what_latex_would_read(text, escaped):
    assert latex(text) == escaped


def test_a_latex_table_has_balanced_braces_and_as_many_cells_as_columns():
    for table in (samples.table(), samples.wide_table()):
        text = to_latex(table)
        plain = re.sub(r"\\[{}]", "", text)
        assert plain.count("{") == plain.count("}")
        body = text.split(r"\toprule")[1].split(r"\bottomrule")[0]
        rows = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert len(rows) == len(table.rows) + 1
        assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(table.columns) - 1}
        assert text.isascii()
        places = [text.index(mark) for mark in (r"\begin{table}", r"\caption", r"\label{tab:", r"\begin{tabular}",
                  r"\end{tabular}", r"\end{table}")]  # fmt: skip
        assert places == sorted(places)


def test_a_label_can_be_chosen():
    assert r"\label{tab:retain}" in to_latex(one(Cell(1.0)), label="tab:retain")


def test_names_cannot_break_a_table_out_of_its_format():
    table = one(Cell(1.0), rows=[("a|b*c <b>_x_", [Cell(text="<i>|</i>")])])
    assert r"| a\|b\*c \<b\>\_x\_ | \<i\>\|\</i\> |" in to_markdown(table)
    assert "<b>" not in to_html(table)
    assert "<i>" not in to_html(table)


def test_a_row_with_a_cell_too_few_is_named():
    table = one(Cell(), columns=["Method", "A", "B"])
    for write in (to_markdown, to_latex, to_html):
        with pytest.raises(ConfigError, match="table t, row 'LoRA': 1 cells for 2 columns"):
            write(table)


def test_a_table_without_rows_is_a_table():
    empty = one(Cell(), rows=[])
    assert to_markdown(empty).splitlines()[2:] == ["| Method | Score |", "| --- | ---: |"]
    assert r"\midrule" in to_latex(empty)
    assert "<tbody>" in to_html(empty)


def test_csv_gives_back_what_was_measured_in_full_precision():
    value = 0.1 + 0.2
    rows = [
        samples.measurement(value=value, method='a, "b"\nc', setting={"tau": 0.9, "on": True}),
        samples.measurement(value=math.nan, sd=math.inf, low=None, setting={"lr": 1e-4}, jobs=()),
    ]
    first, second = csv.DictReader(io.StringIO(measurements_csv(rows, samples.PROVENANCE)))
    assert float(first["value"]) == value
    assert first["method"] == 'a, "b"\nc'
    assert (first["setting.tau"], first["setting.on"], first["setting.lr"]) == ("0.9", "True", "")
    assert first["jobs"].split() == ["merge-lora-1", "merge-lora-2"]
    assert (first["commit"], first["machine.gpu"], first["time"]) == (
        "0123abc",
        "one H100",
        "2026-01-02T03:04:05",
    )
    assert math.isnan(float(second["value"]))
    assert float(second["sd"]) == math.inf
    assert (second["low"], second["setting.tau"], second["jobs"]) == ("", "", "")
    assert float(second["setting.lr"]) == 1e-4


def test_json_has_the_same_rows_and_stays_strict_json():
    rows = [samples.measurement(), samples.measurement(value=math.nan, high=math.inf)]
    text = measurements_json(rows, samples.PROVENANCE)
    first, second = json.loads(text, parse_constant=pytest.fail)
    assert list(first) == next(csv.reader(io.StringIO(measurements_csv(rows, samples.PROVENANCE))))
    assert first["value"] == 61.5
    assert first["jobs"] == ["merge-lora-1", "merge-lora-2"]
    assert first["setting.tau"] == 0.9
    assert (second["value"], second["high"]) == (None, "inf")


def test_no_measurements_are_a_header_and_an_empty_list():
    assert measurements_csv([]).startswith("protocol,method,")
    assert len(measurements_csv([]).splitlines()) == 1
    assert json.loads(measurements_json([])) == []


def test_a_provenance_key_cannot_hide_a_column():
    with pytest.raises(ConfigError, match="provenance key 'metric'"):
        measurements_csv([samples.measurement()], {"metric": "x"})
