"""Edit sets: facts that a model should state differently from now on, built in or from files of rows."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, Field, StringConstraints, ValidationError, model_validator

from hiplora.data.rows import Row, read_rows
from hiplora.errors import DataError, first_problem

BUILT_IN = "builtin"
DATA = Path(__file__).parent / "data"
Category = Literal["Entity/Attribute", "Relation/Fact", "Temporal/Numeric"]
ENTITY, RELATION, NUMERIC = CATEGORIES = ("Entity/Attribute", "Relation/Fact", "Temporal/Numeric")

# CounterFact's Wikidata relations. Attributes: continent, languages, position, field, occupation, genre, religion,
# sport, instrument; a tie to another thing (a place, a person, a company) is a relation. None is about numbers.
_ATTRIBUTES = (30, 37, 39, 101, 103, 106, 136, 140, 364, 407, 413, 641, 1303, 1412)
_RELATIONS = (17, 19, 20, 27, 36, 108, 127, 131, 138, 159, 176, 178, 190, 264, 276, 449, 463, 495, 740, 937)
RELATION_CATEGORIES = {f"P{n}": ENTITY if n in _ATTRIBUTES else RELATION for n in _ATTRIBUTES + _RELATIONS}

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

    `old` None is what the bare model writes. `category` is one of the paper's three (Sect. 5). `paraphrase` is another
    prompt that the edit should carry over to, never trained on; `neighbours` are questions near the edit whose answers
    should stay, where a data set has them.
    """

    prompt: str
    old: str | None
    new: str
    subject: str = ""
    category: str = RELATION
    paraphrase: str | None = None
    neighbours: tuple[Question, ...] = ()


class _OwnRow(BaseModel, extra="forbid", strict=True):
    """A row of the project's own format."""

    prompt: Text
    new: Text
    old: Text | None = None
    subject: str = ""
    category: Category | None = None
    paraphrase: Text | None = None
    set: Text = "edits"

    @model_validator(mode="after")
    def _changes_the_answer(self) -> "_OwnRow":
        if self.old == self.new:
            raise ValueError(f"old and new are both {self.new!r}; an edit must change the answer")
        return self

    def edit(self) -> Edit:
        """Return the row's edit."""
        values = self.model_dump(exclude={"set", "category"})
        return Edit(**values, category=self.category or _category(self.new, self.old or ""))


class _CounterFactRow(BaseModel, strict=True):
    """The fields used of a row of CounterFact or zsRE; `relation` is a Wikidata property, if any."""

    prompt: Text
    target_new: Text
    target_true: Text | None = None
    subject: str = ""
    relation: str = ""
    paraphrase_prompts: list[Text] = Field(default=[])
    neighborhood_prompts: list[Text] = Field(default=[])
    neighborhood_answers: list[Text] = Field(default=[])

    @model_validator(mode="after")
    def _has_an_answer_for_each_prompt(self) -> "_CounterFactRow":
        prompts, answers = len(self.neighborhood_prompts), len(self.neighborhood_answers)
        if prompts != answers:
            raise ValueError(f"{prompts} neighborhood_prompts and {answers} neighborhood_answers; expected as many")
        return self

    def edit(self) -> Edit:
        """Return the row's edit."""
        return Edit(
            prompt=self.prompt,
            old=self.target_true,
            new=self.target_new,
            subject=self.subject,
            category=RELATION_CATEGORIES.get(self.relation) or _category(self.target_true or "", self.target_new),
            paraphrase=next(iter(self.paraphrase_prompts), None),
            neighbours=tuple(map(Question, self.neighborhood_prompts, self.neighborhood_answers)),
        )


def load_edits(
    source: str | os.PathLike = BUILT_IN, limit: int | None = None, *, category: str | None = None
) -> list[Edit]:
    """Read edits from `"builtin"`, a file in the project's own format, or one of CounterFact or zsRE.

    There are over a thousand built-in edits, at least 300 a category, in mixed order; their subjects do not occur in
    `load_questions`. Files are those of training data (JSON lines, a JSON list, parquet); edits in the project's format
    come set by set. Rows of CounterFact and zsRE whose two answers are the same, or that repeat a prompt, are
    left out. The first `limit` edits are taken, of one of the `CATEGORIES` alone if it is given.

    DataError, with file, line and remedy, if the file cannot be read, a row is not an edit, or there are too few.
    """
    rows = list(read_rows(DATA / "editset.jsonl" if str(source) == BUILT_IN else Path(source)))
    if not rows:
        raise DataError(f"{source}: has no edits; give one row an edit")
    by_prompt: dict[str, Edit] = {}
    if isinstance(rows[0][1], dict) and "target_new" in rows[0][1]:
        for _, fact in _checked(rows, source, _CounterFactRow):
            if fact.target_true != fact.target_new:
                by_prompt.setdefault(fact.prompt, fact.edit())
    else:
        checked = list(_checked(rows, source, _OwnRow))
        sets = list(dict.fromkeys(row.set for _, row in checked))
        for place, row in sorted(checked, key=lambda placed: sets.index(placed[1].set)):
            if row.prompt in by_prompt:
                raise DataError(f"{source}, {place}: prompt {row.prompt!r} is in an earlier row; keep one of the two")
            by_prompt[row.prompt] = row.edit()
    edits = [edit for edit in by_prompt.values() if category in (None, edit.category)]
    if len(edits) < (limit or 1):
        kind = f" of the category {category}" if category else ""
        raise DataError(f"{source}: has {len(edits)} edits{kind}, {limit or 1} are asked for; lower the limit")
    return edits[:limit]


def load_questions() -> list[Question]:
    """Return the built-in unrelated questions: at least 500, with true answers, about subjects no edit touches."""
    return [Question(**row) for _, row in read_rows(DATA / "locality.jsonl")]


def _checked(rows: Iterable[Row], where: str | os.PathLike, kind: type[Kind]) -> Iterator[tuple[str, Kind]]:
    for place, row in rows:
        try:
            yield place, kind.model_validate(row)
        except ValidationError as error:
            required = [name for name, field in kind.model_fields.items() if field.is_required()]
            optional = [name for name in kind.model_fields if name not in required]
            raise DataError(
                f"{where}, {place}: {first_problem(error)}; an edit needs {', '.join(required)}, and may have "
                f"{', '.join(optional)}"
            ) from None


def _category(*answers: str) -> str:
    """Return the category of an edit that names none: numeric if an answer has a digit, else a relation."""
    return NUMERIC if re.search(r"\d", "".join(answers)) else RELATION
