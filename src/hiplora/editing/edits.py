"""Edit sets: facts that a model should state differently from now on."""

import importlib.resources
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hiplora.errors import DataError

CATEGORIES = ("Entity/Attribute", "Relation/Fact", "Temporal/Numeric")


@dataclass(frozen=True)
class Edit:
    """One edit: after it, `prompt` should be completed by `new` and no longer by `old`.

    `subject` is what the fact is about, `category` one of the paper's three (Sect. 5), `paraphrase` another
    prompt that the edit should carry over to; it is never trained on.
    """

    prompt: str
    old: str
    new: str
    subject: str
    category: str
    paraphrase: str


@dataclass(frozen=True)
class EditSet:
    """A named collection of edits that are trained together."""

    name: str
    edits: tuple[Edit, ...]

    def __len__(self) -> int:
        return len(self.edits)


def load_edit_sets(path: str | os.PathLike | None = None) -> list[EditSet]:
    """Read edit sets from JSON lines with the fields of `Edit` and `set`, the set's name; None is the built-in file.

    Sets come in the order of their first row.

    Raises:
        DataError: the file cannot be read, or a row is not such an edit; it names file, line and remedy.
    """
    if path is None:
        source = importlib.resources.files("hiplora.editing").joinpath("data/edits.jsonl")
        return _parse(source.read_text(encoding="utf-8"), "built-in edits")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"edits {path}: cannot be read ({error}); name a UTF-8 file of JSON lines") from None
    return _parse(text, str(path))


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
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg}); give one JSON object a line") from None
    names = ["set", *(field.name for field in fields(Edit))]
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
