"""The report page: sections of text, tables and figures in one HTML file that loads nothing else."""

import base64
import functools
import html
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from matplotlib.figure import Figure

from hiplora.files import write_atomic
from hiplora.reporting.plots import svg
from hiplora.reporting.tables import MISSING, formatted

_LONG = 25  # rows above which a table starts folded
_NUMBER = re.compile(r"[-+−]?[\d,.]+(e[-+]?\d+)?( of \d+)?\s?(%|s|GB|MB|pp)?( \[.*\])?")


@dataclass(frozen=True)
class Section:
    """A part of a page: paragraphs (separated by a blank line), then tables and figures by their captions.

    `text` is plain text; `html` is markup that the page takes as it is.
    """

    title: str
    text: str = ""
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    figures: Mapping[str, Figure] = field(default_factory=dict)
    html: str = ""

    @property
    def paragraphs(self) -> list[str]:
        """The text's paragraphs."""
        return [part.strip() for part in self.text.split("\n\n") if part.strip()]


def save_page(
    path: str | os.PathLike,
    title: str,
    sections: Sequence[Section],
    subtitle: str = "",
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write one self-contained HTML page and return its path; `provenance`, nested, is shown folded at its end."""
    about = pd.json_normalize(dict(provenance or {})).astype(object).to_dict("records")
    page = _template().render(title=title, subtitle=subtitle, sections=sections, provenance=about)
    return write_atomic(path, page)


def answers_html(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the answers to each prompt as markup.

    A row has `prompt`, `said` (model → runs of text, each with whether it differs from the first model's answer) and
    may have `expected`.
    """
    blocks = []
    for row in rows:
        lines = [("expected", html.escape(row["expected"]))] if row.get("expected") else []
        whole = ["".join(text for text, _ in runs) for runs in row["said"].values()]
        for place, (name, runs) in enumerate(row["said"].items()):
            text = "".join(_marked(text) if changed else html.escape(text) for text, changed in runs)
            same = place and whole[place] == whole[0]  # an answer of which words are left out has no run that changed
            lines.append((name, "<em>the same, word for word</em>" if same else text))
        cells = "".join(f"<dt>{html.escape(name)}</dt><dd>{text}</dd>" for name, text in lines)
        blocks.append(f'<div class="answers"><p>{html.escape(row["prompt"])}</p><dl>{cells}</dl></div>')
    return "\n".join(blocks)


def _marked(text: str) -> str:
    """Mark a run of words, without the space before it."""
    words = text.lstrip()
    return text[: len(text) - len(words)] + f"<mark>{html.escape(words)}</mark>"


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja", globals={"table": _table, "picture": _picture})


def _table(df: pd.DataFrame) -> dict[str, Any]:
    """Columns as (name, whether its cells are numbers), rows of texts, and whether the table is long."""
    text = formatted(df)
    rows = text.to_numpy().tolist()
    numeric = [
        all(cell == MISSING or _NUMBER.fullmatch(cell) for cell in column) for column in zip(*rows, strict=True)
    ]
    names = list(zip(text.columns, numeric or [False] * text.shape[1], strict=True))
    return {"columns": names, "rows": rows, "numeric": numeric, "long": len(rows) > _LONG}


def _picture(figure: Figure) -> dict[str, Any]:
    data = base64.b64encode(svg(figure).encode()).decode()
    return {"source": f"data:image/svg+xml;base64,{data}", "width": round(96 * figure.get_figwidth())}
