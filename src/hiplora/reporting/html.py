"""The report page: sections of text, tables, figures and answers in one HTML file that loads nothing else."""

import base64
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hiplora.extras import require

require("reports")

import jinja2
import pandas as pd
from matplotlib.figure import Figure

from hiplora.files import write_atomic
from hiplora.reporting.plots import svg
from hiplora.reporting.tables import MISSING, formatted

_LONG = 25  # rows above which a table starts folded
_NUMBER = re.compile(r"[-+−]?[\d,.]+(e[-+]?\d+)?( of \d+)?\s?(%|s|GB|MB|pp)?( \[.*\])?")
_PAGES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True)
class Section:
    """A part of a page: paragraphs (separated by a blank line), answers, tables and figures by their captions, code.

    A row of `answers` has `prompt`, `said` (model → runs of text, each with whether it differs from the first model's
    answer) and may have `expected`.
    """

    title: str
    text: str = ""
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    figures: Mapping[str, Figure] = field(default_factory=dict)
    answers: Sequence[Mapping[str, Any]] = ()
    code: str = ""


def save_page(
    path: str | os.PathLike,
    title: str,
    sections: Sequence[Section],
    subtitle: str = "",
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write one self-contained HTML page and return its path; `provenance`, nested, is shown folded at its end."""
    about = pd.json_normalize(dict(provenance or {})).astype(object).to_dict("records")
    template = _PAGES.get_template("page.html.jinja", globals={"table": _table, "picture": _picture})
    page = template.render(title=title, subtitle=subtitle, sections=sections, provenance=about)
    return write_atomic(path, page)


def _table(df: pd.DataFrame) -> dict[str, Any]:
    """Columns as (name, whether its cells are numbers), rows of texts, and whether the table is long."""
    text = formatted(df)
    numeric = [
        all(cell == MISSING or _NUMBER.fullmatch(cell) for cell in text.iloc[:, i]) for i in range(text.shape[1])
    ]
    names = list(zip(text.columns, numeric if len(text) else [False] * len(numeric), strict=True))
    return {"columns": names, "rows": text.to_numpy().tolist(), "numeric": numeric, "long": len(text) > _LONG}


def _picture(figure: Figure) -> dict[str, Any]:
    data = base64.b64encode(svg(figure).encode()).decode()
    return {"source": f"data:image/svg+xml;base64,{data}", "width": round(96 * figure.get_figwidth())}
