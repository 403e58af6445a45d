"""DataFrames as text: for pages, and as CSV, Markdown and LaTeX files."""

import os
from pathlib import Path
from typing import Any

import pandas as pd

from hiplora.files import write_atomic

MISSING = "–"


def formatted(df: pd.DataFrame, digits: int = 3) -> pd.DataFrame:
    """Return the table as strings: floats to `digits` significant digits, integers with thousands separators.

    Missing values become a dash, booleans yes or no. An index other than 0, 1, … becomes the first columns.
    """
    if not isinstance(df.index, pd.RangeIndex):
        df = df.reset_index(names=[name or "" for name in df.index.names])
    columns = {i: [_text(value, digits) for value in df.iloc[:, i]] for i in range(df.shape[1])}
    return pd.DataFrame(columns).set_axis([_label(name) for name in df.columns], axis="columns")


def interval(estimate: float | None, low: float | None, high: float | None, digits: int = 1) -> str:
    """Return an estimate with its interval as text: `1.2 [0.3, 2.1]`; without known bounds the estimate alone."""
    if pd.isna(estimate):
        return MISSING
    if pd.isna(low) or pd.isna(high):
        return f"{estimate:.{digits}f}"
    return f"{estimate:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def save_table(df: pd.DataFrame, stem: str | os.PathLike) -> list[Path]:
    """Write `stem.csv` with the values as they are, and `stem.md` and `stem.tex` with `formatted` ones."""
    text, keep = formatted(df), not isinstance(df.index, pd.RangeIndex)
    latex = text.style.format(escape="latex").format_index(escape="latex", axis="columns").hide(axis="index")
    return [
        write_atomic(f"{stem}.csv", df.to_csv(index=keep, lineterminator="\n")),
        write_atomic(f"{stem}.md", text.to_markdown(index=False, disable_numparse=True) + "\n"),
        write_atomic(f"{stem}.tex", latex.to_latex(hrules=True)),
    ]


def _label(name: Any) -> str:
    return " ".join(str(part) for part in name if part != "") if isinstance(name, tuple) else str(name)


def _text(value: Any, digits: int) -> str:
    value = value.item() if hasattr(value, "item") else value
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float) and not 10 ** (digits - 1) <= abs(value) < 1e9:
        return f"{value:#.{digits}g}".removesuffix(".")  # 99.97 → 100
    return f"{value:,.0f}" if isinstance(value, float) else str(value)
