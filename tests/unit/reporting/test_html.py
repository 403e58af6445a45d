"""The page: everything in one file, nothing fetched, text taken literally."""

import re

import pandas as pd
import pytest

from hiplora.reporting import Section, answers_html, plots, save_page

TABLE = pd.DataFrame({"method": ["LoRA", "HiP-LoRA"], "drift": [0.123456, 0.01]})


def section(**changes):
    figure = plots.scatter(TABLE, "drift", "drift", "method")
    values = {"text": "One.\n\nTwo.", "tables": {"Drift": TABLE}, "figures": {"Drift of each": figure}}
    return Section("Drift", **{**values, **changes})


def test_a_page_holds_its_text_tables_and_figures_and_asks_for_nothing(tmp_path):
    path = save_page(tmp_path / "out" / "report.html", "A title", [section()], "a subtitle", {"seed": {"a": 1}})
    page = path.read_text()
    assert "<h1>A title</h1>" in page
    assert page.count("<p>") == 2
    assert "0.123" in page
    assert "seed.a" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "<script" not in page


@pytest.mark.parametrize(
    ("title", "changes", "there"),
    [
        ("<b>", {"text": "<i>x</i>", "tables": {"<t>": TABLE}}, ["&lt;b&gt;", "&lt;i&gt;x", "&lt;t&gt;"]),
        ("t", {"html": "<em>kept</em>"}, ["<em>kept</em>"]),
        ("t", {"tables": {"Modules": pd.DataFrame({"norm": range(40)})}}, ["<details><summary>Modules"]),
        ("t", {"tables": {"Nothing": TABLE.iloc[:0]}}, ["method"]),
    ],
    ids=["text is escaped", "html is not", "a long table is folded", "an empty table shows its columns"],
)
def test_a_section_is_shown_as_it_should_be(tmp_path, title, changes, there):
    page = save_page(tmp_path / "report.html", title, [section(**changes)]).read_text()
    assert not [text for text in there if text not in page]
    assert "<i>" not in page


def test_differences_are_marked_an_equal_answer_is_said_to_be_the_same_and_text_is_escaped():
    said = {
        "base": [("no\n  <i>way", False)],
        "LoRA": [("no\n  <i>way", False)],
        "HiP-LoRA": [("no", False), ("\n  <b>", True)],
        "shorter": [("no", False)],
    }
    shown = answers_html([{"prompt": "<b>?", "expected": "a & b", "said": said}])
    assert "&lt;b&gt;?" in shown
    assert "<dt>expected</dt><dd>a &amp; b</dd><dt>base</dt><dd>no\n  &lt;i&gt;way</dd>" in shown
    assert "<dt>LoRA</dt><dd><em>the same, word for word</em></dd>" in shown
    assert "<dt>HiP-LoRA</dt><dd>no\n  <mark>&lt;b&gt;</mark></dd><dt>shorter</dt><dd>no</dd>" in shown
