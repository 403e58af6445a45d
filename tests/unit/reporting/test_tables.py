"""Tables as text and as files."""

import math

import pandas as pd
import pytest

from hiplora.reporting import formatted, interval, save_table


def test_numbers_are_rounded_to_three_significant_digits_and_missing_ones_are_a_dash():
    df = pd.DataFrame({"a": [0.0123456, 1234.6, math.nan], "n": [1234567, 2, 3], "b": [True, False, None]})
    shown = formatted(df)
    assert shown["a"].tolist() == ["0.0123", "1,235", "–"]
    assert shown["n"].tolist() == ["1,234,567", "2", "3"]
    assert shown["b"].tolist() == ["yes", "no", "–"]


def test_a_named_index_becomes_the_first_column():
    df = pd.DataFrame({"x": [1, 2]}, index=pd.Index(["LoRA", "HiP-LoRA"], name="method"))
    assert formatted(df).columns.tolist() == ["method", "x"]


def test_columns_of_one_name_are_kept_apart():
    df = pd.DataFrame([[1, 2]], columns=["x", "x"])
    assert formatted(df).to_numpy().tolist() == [["1", "2"]]


@pytest.mark.parametrize(
    ("values", "text"),
    [((1.234, 0.3, 2.06), "1.2 [0.3, 2.1]"), ((1.0, None, None), "1.0"), ((math.nan, 0, 1), "–")],
)
def test_an_interval_is_written_in_brackets(values, text):
    assert interval(*values) == text


def test_a_table_is_saved_as_csv_with_full_values_markdown_and_escaped_latex(tmp_path):
    df = pd.DataFrame({"drift %": [0.123456], "method_name": ["a_b & c"]})
    csv, markdown, latex = save_table(df, tmp_path / "tables" / "drift")
    assert pd.read_csv(csv)["drift %"][0] == 0.123456
    assert markdown.read_text().splitlines()[2].split("|")[1:3] == [" 0.123     ", " a_b & c       "]
    assert r"a\_b \& c" in latex.read_text()
    assert r"drift \%" in latex.read_text()
