"""Edit sets: facts that a model should state differently from now on."""

import gzip
import importlib.resources
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hiplora.errors import DataError

CATEGORIES = ("Entity/Attribute", "Relation/Fact", "Temporal/Numeric")
FIELDS = ("prompt", "old", "new", "subject", "category", "paraphrase")


@dataclass(frozen=True)
class Question:
    """A prompt with its true answer, and what it is about: nothing that editing should change."""

    prompt: str
    answer: str
    subject: str = ""


@dataclass(frozen=True)
class Edit:
    """One edit: after it, `prompt` should be completed by `new` and no longer by `old`.

    `subject` is what the fact is about, `category` one of the paper's three (Sect. 5), `paraphrase` another
    prompt that the edit should carry over to; it is never trained on. `neighbours` are questions near the edit whose
    answers should stay, where a data set has them.
    """

    prompt: str
    old: str
    new: str
    subject: str
    category: str
    paraphrase: str
    neighbours: tuple[Question, ...] = ()


@dataclass(frozen=True)
class EditSet:
    """A named collection of edits that are trained together."""

    name: str
    edits: tuple[Edit, ...]

    def __len__(self) -> int:
        return len(self.edits)


def load_edit_sets(path: str | os.PathLike | None = None) -> list[EditSet]:
    """Read edit sets from JSON lines with the fields in `FIELDS` and `set`, the set's name.

    None is the small built-in file. Sets come in the order of their first row.

    Raises:
        DataError: the file cannot be read, or a row is not such an edit; it names file, line and remedy.
    """
    if path is None:
        return _parse(_built_in("edits.jsonl"), "built-in edits")
    return _parse(read_lines(path), str(path))


def load_edit_set() -> EditSet:
    """Return the large built-in set: over a thousand edits of the project's own, every category at least 300 times.

    Its subjects are none of `load_questions`; the categories are mixed, so that its first n edits are a sample of all.
    """
    (whole,) = _parse(_built_in("editset.jsonl"), "built-in edits")
    return whole


def load_questions() -> tuple[Question, ...]:
    """Return the built-in unrelated questions: at least 500, with true answers, about subjects that no edit touches."""
    rows = (json.loads(line) for line in _built_in("locality.jsonl").splitlines())
    return tuple(Question(**row) for row in rows)


def read_lines(path: str | os.PathLike) -> str:
    """Return the text of a file of JSON lines, gzipped or not.

    Raises:
        DataError: it cannot be read.
    """
    try:
        raw = Path(path).read_bytes()
        return (gzip.decompress(raw) if Path(path).suffix == ".gz" else raw).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"edits {path}: cannot be read ({error}); name a UTF-8 file of JSON lines") from None


def json_line(line: str, where: str) -> Any:
    """Return the value of a line of JSON; `where` is its file and number, for the message.

    Raises:
        DataError: it is no JSON.
    """
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg}); give one JSON object a line") from None


def _built_in(name: str) -> str:
    return importlib.resources.files("hiplora.editing").joinpath("data", name).read_text(encoding="utf-8")


def _parse(text: str, where: str) -> list[EditSet]:
    sets: dict[str, list[Edit]] = {}
    seen: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        name, edit = _row(line, f"{where}, line {number}")
        if edit.prompt in seen:
            raise DataError(
                f"{where}, line {number}: prompt {edit.prompt!r} stands in line {seen[edit.prompt]} already; "
                "keep one of the two"
            )
        seen[edit.prompt] = number
        sets.setdefault(name, []).append(edit)
    if not sets:
        raise DataError(f"{where}: has no edits; give one JSON object a line")
    return [EditSet(name, tuple(edits)) for name, edits in sets.items()]


def _row(line: str, where: str) -> tuple[str, Edit]:
    row = json_line(line, where)
    names = ["set", *FIELDS]
    if not isinstance(row, Mapping) or set(row) != set(names):
        found = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise DataError(f"{where}: expected exactly the fields {', '.join(names)}; found {found}")
    _check(row, names, where)
    return row["set"], Edit(**{name: row[name] for name in names[1:]})


def _check(row: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    for name in names:
        if not isinstance(row[name], str) or not row[name].strip() or row[name] != row[name].strip():
            raise DataError(
                f"{where}: {name} is {row[name]!r}; expected text that is not empty and has no outer spaces"
            )
    if row["category"] not in CATEGORIES:
        raise DataError(f"{where}: category is {row['category']!r}; expected one of {', '.join(CATEGORIES)}")
    if row["old"] == row["new"]:
        raise DataError(f"{where}: old and new are both {row['new']!r}; an edit must change the answer")
