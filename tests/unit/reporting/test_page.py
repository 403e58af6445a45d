"""Tables as text and files, and the page: everything in one file, nothing fetched, text taken literally."""

import html
import re

import pandas as pd
import pytest

from hiplora.reporting import formatted, plots, save_table
from hiplora.reporting.html import Section, save_page

TABLE = pd.DataFrame({"method": ["LoRA", "HiP-LoRA"], "drift": [0.123456, 0.01]})


def test_a_page_holds_its_text_tables_and_figures_literally_and_asks_for_nothing(tmp_path):
    tables = {"<t>": TABLE, "Modules": pd.DataFrame({"norm": range(40)}), "Nothing": TABLE.iloc[:0]}
    figures = {"Drift of each": plots.scatter(TABLE, "drift", "drift", "method")}
    section = Section("Drift", "One.\n\n<i>Two.", tables, figures, code="hiplora <x>")
    page = save_page(tmp_path / "out" / "report.html", "<b>", [section], "below", {"seed": {"a": 1}}).read_text()
    assert page.count("<p>") == 2
    assert not re.findall(r'(?:src|href)="(?!data:)|<script|<[bi]>', page)
    shown = ["&lt;b&gt;", "&lt;i&gt;Two", "&lt;t&gt;", "0.123", "seed.a", "<details><summary>Modules"]
    for text in (*shown, "<pre>hiplora &lt;x&gt;</pre>", "Drift of each"):
        assert text in page


def test_differences_are_marked_an_equal_answer_is_said_to_be_the_same_and_text_is_escaped(tmp_path):
    said = {
        "base": [("no\n  <i>way", False)],
        "LoRA": [("no\n  <i>way", False)],
        "HiP-LoRA": [("no", False), ("\n  <b>", True)],
        "shorter": [("no", False)],
    }
    section = Section("t", answers=[{"prompt": "<b>?", "expected": "a & b", "said": said}])
    page = save_page(tmp_path / "report.html", "t", [section]).read_text()
    answers = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page, re.DOTALL))
    assert "<p>&lt;b&gt;?</p>" in page
    assert html.unescape(answers.pop("expected")) == "a & b"
    assert answers == {
        "base": "no\n  &lt;i&gt;way",
        "LoRA": "<em>the same, word for word</em>",
        "HiP-LoRA": "no\n  <mark>&lt;b&gt;</mark>",
        "shorter": "no",
    }


@pytest.mark.parametrize(
    ("value", "text"), [(0.123456, "0.123"), (9.999, "10.0"), (99.97, "100"), (-99.97, "-100"), (1234.5, "1,234")]
)
def test_numbers_have_three_digits_and_no_point_at_their_end(value, text):
    assert formatted(pd.DataFrame({"drift": [value]})).iloc[0, 0] == text


def test_a_table_is_saved_as_csv_with_full_values_markdown_and_escaped_latex(tmp_path):
    df = pd.DataFrame({"drift %": [0.123456], "method_name": ["a_b & c"]})
    csv, markdown, latex = save_table(df, tmp_path / "tables" / "drift")
    assert pd.read_csv(csv)["drift %"][0] == 0.123456
    assert markdown.read_text().splitlines()[2].split("|")[1:3] == [" 0.123     ", " a_b & c       "]
    assert r"a\_b \& c" in latex.read_text()
    assert r"drift \%" in latex.read_text()
