"""Edits of CounterFact and zsRE from files of JSON lines; none of either comes with this project."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hiplora.editing.edits import (
    CATEGORIES,
    Edit,
    EditSet,
    Question,
    json_line,
    load_edit_set,
    load_edit_sets,
    read_lines,
)
from hiplora.errors import ConfigError, DataError

BUILT_IN = "builtin"
UNLABELLED = "unlabelled"
ENTITY, RELATION, NUMERIC = "Entity/Attribute", "Relation/Fact", "Temporal/Numeric"

# The Wikidata relations of CounterFact. What a thing is or is like is an attribute; what ties it to another thing (a
# place, a person, a firm) is a relation. None of them is about times or numbers.
RELATION_CATEGORIES: Mapping[str, str] = {
    "P30": ENTITY,  # continent
    "P37": ENTITY,  # official language
    "P39": ENTITY,  # position held
    "P101": ENTITY,  # field of work
    "P103": ENTITY,  # native language
    "P106": ENTITY,  # occupation
    "P136": ENTITY,  # genre
    "P140": ENTITY,  # religion
    "P364": ENTITY,  # original language of a film
    "P407": ENTITY,  # language of a work
    "P413": ENTITY,  # position in a team
    "P641": ENTITY,  # sport
    "P1303": ENTITY,  # instrument
    "P1412": ENTITY,  # languages spoken
    "P17": RELATION,  # country
    "P19": RELATION,  # place of birth
    "P20": RELATION,  # place of death
    "P27": RELATION,  # citizenship
    "P36": RELATION,  # capital
    "P108": RELATION,  # employer
    "P127": RELATION,  # owner
    "P131": RELATION,  # administrative unit
    "P138": RELATION,  # named after
    "P159": RELATION,  # headquarters
    "P176": RELATION,  # manufacturer
    "P178": RELATION,  # developer
    "P190": RELATION,  # twin town
    "P264": RELATION,  # record label
    "P276": RELATION,  # location
    "P449": RELATION,  # broadcaster
    "P463": RELATION,  # member of
    "P495": RELATION,  # country of origin
    "P740": RELATION,  # place of formation
    "P937": RELATION,  # place of work
}
_TEXTS = ("prompt", "subject", "target_true", "target_new")
_LISTS = ("paraphrase_prompts", "neighborhood_prompts", "neighborhood_answers")


def load_counterfact(
    path: str | os.PathLike, limit: int | None = None, *, neighbours: int | None = None
) -> EditSet:
    """Read edits of CounterFact or zsRE, in the order of the file.

    A row has the texts `prompt`, `subject`, `target_true`, `target_new`, `relation` and the lists `paraphrase_prompts`
    (the first is used), `neighborhood_prompts` and `neighborhood_answers`; `.gz` is unpacked. The category follows
    from the relation (`RELATION_CATEGORIES`); where that is "unlabelled", as in zsRE, answers with a digit are
    Temporal/Numeric and all others Relation/Fact. Rows whose two answers are the same, and rows that repeat a
    prompt, are no edits and are left out.

    Args:
        path: the file.
        limit: the first so many edits; None is all.
        neighbours: of each edit, the first so many questions near it; None is all.

    Raises:
        ConfigError: a count is below its minimum.
        DataError: the file cannot be read, holds fewer than `limit` edits, or a row is not such an edit.
    """
    for name, value, least in (("limit", limit, 1), ("neighbours", neighbours, 0)):
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value}; expected at least {least}")
    edits: dict[str, Edit] = {}
    for edit in _rows(read_lines(path), str(path), neighbours):
        if edit.old != edit.new:
            edits.setdefault(edit.prompt, edit)
        if len(edits) == limit:
            break
    return EditSet(Path(path).name.split(".")[0], _first(tuple(edits.values()), limit, str(path)))


def load_edits(
    source: str | os.PathLike,
    limit: int | None = None,
    *,
    neighbours: int | None = None,
    category: str | None = None,
) -> EditSet:
    """Read edits from `"builtin"`, a file in the project's own format, or one of CounterFact or zsRE.

    `neighbours` is for the latter, as in `load_counterfact`; the others have none. `category` takes those of one
    category alone, the first `limit` of them.

    Raises:
        DataError: as `load_counterfact` and `hiplora.editing.load_edit_sets`, or there are no edits of the category.
        ConfigError: there is no such category.
    """
    if category is not None:
        if category not in CATEGORIES:
            raise ConfigError(f"category is {category!r}; expected one of {', '.join(CATEGORIES)}")
        whole = load_edits(source, neighbours=neighbours)
        of_it = tuple(edit for edit in whole.edits if edit.category == category)
        return EditSet(whole.name, _first(of_it, limit, f"edits {source} of the category {category}"))
    if str(source) == BUILT_IN and not Path(source).exists():
        whole = load_edit_set()
        return EditSet(whole.name, _first(whole.edits, limit, "built-in edits"))
    if _is_counterfact(read_lines(source)):
        return load_counterfact(source, limit, neighbours=neighbours)
    edits = tuple(edit for part in load_edit_sets(source) for edit in part.edits)
    return EditSet(Path(source).name.split(".")[0], _first(edits, limit, str(source)))


def _first(edits: tuple[Edit, ...], limit: int | None, where: str) -> tuple[Edit, ...]:
    if not edits:
        raise DataError(f"{where}: has no edits; give one JSON object a line")
    if limit is not None and len(edits) < limit:
        raise DataError(f"{where}: has {len(edits)} edits, {limit} are asked for; lower the limit")
    return edits[:limit]


def _is_counterfact(text: str) -> bool:
    first = next((line for line in text.splitlines() if line.strip()), "")
    return '"target_new"' in first


def _rows(text: str, where: str, neighbours: int | None) -> Iterator[Edit]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield _edit(line, f"{where}, line {number}", neighbours)


def _edit(line: str, where: str, neighbours: int | None) -> Edit:
    row = json_line(line, where)
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: is a {type(row).__name__}; expected a JSON object with prompt, target_new, …"
        )
    texts = {name: _text(row, name, where) for name in (*_TEXTS, "relation")}
    paraphrases, prompts, answers = (_list(row, name, where) for name in _LISTS)
    if not paraphrases:
        raise DataError(f"{where}: paraphrase_prompts is empty; expected at least one prompt")
    if len(prompts) != len(answers):
        raise DataError(
            f"{where}: {len(prompts)} neighborhood_prompts and {len(answers)} neighborhood_answers; expected as many"
        )
    near = [Question(*pair) for pair in zip(prompts, answers, strict=True)]
    return Edit(
        prompt=texts["prompt"],
        old=texts["target_true"],
        new=texts["target_new"],
        subject=texts["subject"],
        category=_category(texts, where),
        paraphrase=paraphrases[0],
        neighbours=tuple(near[:neighbours]),
    )


def _category(texts: Mapping[str, str], where: str) -> str:
    relation = texts["relation"]
    if relation == UNLABELLED:
        return NUMERIC if re.search(r"\d", texts["target_true"] + texts["target_new"]) else RELATION
    if relation not in RELATION_CATEGORIES:
        raise DataError(
            f"{where}: relation is {relation!r}; expected one of {', '.join(RELATION_CATEGORIES)} or {UNLABELLED}"
        )
    return RELATION_CATEGORIES[relation]


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {name} is {value!r}; expected text that is not empty")
    return value.strip()


def _list(row: Mapping[str, Any], name: str, where: str) -> list[str]:
    value = row.get(name)
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise DataError(f"{where}: {name} is {value!r}; expected a list of texts")
    return [text.strip() for text in value]
