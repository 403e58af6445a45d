"""Edit sets: facts that a model should state differently from now on, built in or from files of JSON lines."""

import gzip
import importlib.resources
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from hiplora.errors import DataError, first_problem

BUILT_IN = "builtin"
Category = Literal["Entity/Attribute", "Relation/Fact", "Temporal/Numeric"]
ENTITY, RELATION, NUMERIC = CATEGORIES = ("Entity/Attribute", "Relation/Fact", "Temporal/Numeric")

# CounterFact's Wikidata relations. Attributes: continent, languages, position, field, occupation, genre, religion,
# sport, instrument; a tie to another thing (a place, a person, a company) is a relation. None is about numbers.
_ATTRIBUTES = re.findall(r"P\d+", "P30 P37 P39 P101 P103 P106 P136 P140 P364 P407 P413 P641 P1303 P1412")
_RELATIONS = re.findall(
    r"P\d+", "P17 P19 P20 P27 P36 P108 P127 P131 P138 P159 P176 P178 P190 P264 P276 P449 P463 P495 P740 P937"
)
RELATION_CATEGORIES = dict.fromkeys(_ATTRIBUTES, ENTITY) | dict.fromkeys(_RELATIONS, RELATION)

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Kind = TypeVar("Kind", bound=BaseModel)


@dataclass(frozen=True)
class Question:
    """A prompt with its true answer, and what it is about: nothing that editing should change."""

    prompt: str
    answer: str
    subject: str = ""


@dataclass(frozen=True)
class Edit:
    """One edit: after it, `prompt` should be completed by `new` and no longer by `old`.

    `category` is one of the paper's three (Sect. 5); `paraphrase` is another prompt that the edit should carry over
    to, never trained on; `neighbours` are questions near the edit whose answers should stay, where a data set has them.
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
    """A named collection of edits."""

    name: str
    edits: tuple[Edit, ...]

    def __len__(self) -> int:
        return len(self.edits)


class _OwnRow(BaseModel):
    """A row of the project's own format."""

    model_config = ConfigDict(extra="forbid")
    set: Text
    prompt: Text
    old: Text
    new: Text
    subject: Text
    category: Category
    paraphrase: Text

    @model_validator(mode="after")
    def _changes_the_answer(self) -> "_OwnRow":
        if self.old == self.new:
            raise ValueError(f"old and new are both {self.new!r}; an edit must change the answer")
        return self


class _CounterFactRow(BaseModel):
    """A row of CounterFact or zsRE; `relation` is a Wikidata property, or "unlabelled" in zsRE."""

    prompt: Text
    subject: Text
    target_true: Text
    target_new: Text
    relation: Literal[("unlabelled", *RELATION_CATEGORIES)]  # type: ignore[valid-type]
    paraphrase_prompts: Annotated[list[Text], Field(min_length=1)]
    neighborhood_prompts: list[Text]
    neighborhood_answers: list[Text]

    @model_validator(mode="after")
    def _has_an_answer_for_each_prompt(self) -> "_CounterFactRow":
        prompts, answers = len(self.neighborhood_prompts), len(self.neighborhood_answers)
        if prompts != answers:
            raise ValueError(f"{prompts} neighborhood_prompts and {answers} neighborhood_answers; expected as many")
        return self

    def edit(self) -> Edit:
        """Return the edit; without a relation, answers with a digit are numeric, all others relations."""
        numeric = re.search(r"\d", self.target_true + self.target_new)
        near = zip(self.neighborhood_prompts, self.neighborhood_answers, strict=True)
        return Edit(
            prompt=self.prompt,
            old=self.target_true,
            new=self.target_new,
            subject=self.subject,
            category=RELATION_CATEGORIES.get(self.relation, NUMERIC if numeric else RELATION),
            paraphrase=self.paraphrase_prompts[0],
            neighbours=tuple(Question(*pair) for pair in near),
        )


def load_edits(
    source: str | os.PathLike = BUILT_IN, limit: int | None = None, *, category: str | None = None
) -> EditSet:
    """Read edits from `"builtin"`, a file in the project's own format, or one of CounterFact or zsRE.

    Built-in are over a thousand edits of the project's own, at least 300 a category, in mixed order; their subjects do
    not occur in `load_questions`. Files hold one JSON object a line, `.gz` is unpacked. Rows of CounterFact and zsRE
    whose two answers are the same, or that repeat a prompt, are left out. The first `limit` edits are taken, of one
    of the `CATEGORIES` alone if it is given.

    Raises:
        DataError: the file cannot be read, a row is not an edit, or there are fewer than `limit`.
    """
    if str(source) == BUILT_IN:
        (found,) = _own_sets(_built_in("editset.jsonl"), "built-in edits")
        name, edits = found.name, list(found.edits)
    else:
        name, where, text = Path(source).name.split(".")[0], str(source), _read(source)
        if '"target_new"' in text.lstrip().partition("\n")[0]:
            of_prompt: dict[str, Edit] = {}
            for _, row in _rows(text, where, _CounterFactRow):
                if row.target_true != row.target_new:
                    of_prompt.setdefault(row.prompt, row.edit())
            edits = list(of_prompt.values())
        else:
            edits = [edit for part in _own_sets(text, where) for edit in part.edits]
    edits = [edit for edit in edits if category in (None, edit.category)]
    if len(edits) < (limit or 1):
        of_it = f" of the category {category}" if category else ""
        raise DataError(f"{source}: has {len(edits)} edits{of_it}, {limit or 1} are asked for; lower the limit")
    return EditSet(name, tuple(edits[:limit]))


def load_edit_sets(path: str | os.PathLike | None = None) -> list[EditSet]:
    """Read named edit sets in the project's own format, in the order of their first rows; None is the demo's.

    Raises:
        DataError: the file cannot be read, or a row is not an edit; it names file, line and remedy.
    """
    if path is None:
        return _own_sets(_built_in("edits.jsonl"), "built-in edits")
    return _own_sets(_read(path), str(path))


def load_questions() -> list[Question]:
    """Return the built-in unrelated questions: at least 500, with true answers, about subjects no edit touches."""
    return [Question(**json.loads(line)) for line in _built_in("locality.jsonl").splitlines()]


def _built_in(name: str) -> str:
    return importlib.resources.files("hiplora.editing").joinpath("data", name).read_text(encoding="utf-8")


def _read(path: str | os.PathLike) -> str:
    try:
        raw = Path(path).read_bytes()
        return (gzip.decompress(raw) if Path(path).suffix == ".gz" else raw).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"edits {path}: cannot be read ({error}); name a UTF-8 file of JSON lines") from None


def _rows(text: str, where: str, kind: type[Kind]) -> Iterator[tuple[int, Kind]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield number, kind.model_validate_json(line, strict=True)
            except ValidationError as error:
                raise DataError(
                    f"{where}, line {number}: {first_problem(error)}; expected a JSON object with "
                    f"{', '.join(kind.model_fields)}"
                ) from None


def _own_sets(text: str, where: str) -> list[EditSet]:
    sets: dict[str, list[Edit]] = {}
    seen: dict[str, int] = {}
    for number, row in _rows(text, where, _OwnRow):
        if (first := seen.setdefault(row.prompt, number)) != number:
            raise DataError(
                f"{where}, line {number}: prompt {row.prompt!r} is in line {first} already; keep one of the two"
            )
        sets.setdefault(row.set, []).append(Edit(**row.model_dump(exclude={"set"})))
    if not sets:
        raise DataError(f"{where}: has no edits; give one JSON object a line")
    return [EditSet(name, tuple(edits)) for name, edits in sets.items()]
