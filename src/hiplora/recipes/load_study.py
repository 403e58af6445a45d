"""Read a study's recipe: a YAML file, or one of those that come with hiplora by its name."""

import difflib
import importlib.resources
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from hiplora.errors import ConfigError
from hiplora.recipes.document import Document, Loc, purpose, put_over, read_document, refusal
from hiplora.recipes.study import StudyRecipe


def own_studies() -> list[str]:
    """Return the names of the studies that come with hiplora."""
    folder = importlib.resources.files("hiplora.recipes") / "studies"
    return sorted(
        entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )


def load_study(recipe: str | os.PathLike, overrides: Sequence[str] = ()) -> StudyRecipe:
    """Read a study's recipe, put `overrides` (`train.steps=20`) over it, and check all of it.

    A recipe may `extends:` another, a name or a file beside it: what it says itself goes over that.

    Args:
        recipe: a YAML file, or a name of `own_studies`.
        overrides: `a.b=value` each; the value is read as YAML.

    Raises:
        ConfigError: something is wrong; the message lists everything that is, with file, line and remedy.
    """
    path = _find(recipe)
    document = read_document(path)
    document.value = _extended(document, path)
    for override in overrides:  # over what the recipe extends, too
        put_over(document, override)
    value, problems = dict(document.value), list(document.problems)
    model = value.get("model")
    if isinstance(model, str) and model.startswith((".", "/", "~")):
        value["model"] = os.path.normpath(document.folder / Path(model).expanduser())
    try:
        found = StudyRecipe.model_validate(value)
    except ValidationError as error:
        problems += [_describe(details, document) for details in error.errors()]
        found = None
    if problems or found is None:
        raise refusal(path, problems)
    return found


def _extended(document: Document, *paths: Path) -> dict[str, Any]:
    """Return a document's values over those of the recipe that it `extends`, block by block; a null takes one out."""
    value = dict(document.value)
    parent = value.pop("extends", None)
    if parent is None:
        return value
    if not isinstance(parent, str):
        raise ConfigError(f"{paths[-1]}: extends is {parent!r}; expected one recipe, a name or a file")
    beside = document.folder / parent
    path = beside if beside.is_file() else _find(parent)
    if path.resolve() in {one.resolve() for one in paths}:
        raise ConfigError(
            f"{paths[-1]}: extends {parent}, which extends this recipe itself; break the circle"
        )
    return _over(_extended(read_document(path), *paths, path), value)


def _over(below: dict[str, Any], above: dict[str, Any], depth: int = 0) -> dict[str, Any]:
    """Return one recipe put over another: domains, methods and protocols by name, all else whole."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if value is None and depth:
            merged.pop(key, None)
        elif depth < 1 and isinstance(value, dict) and isinstance(old, dict):
            merged[key] = _over(old, value, depth + 1)
        else:
            merged[key] = value
    return merged


def _find(recipe: str | os.PathLike) -> Path:
    if str(recipe) in own_studies():
        return Path(str(importlib.resources.files("hiplora.recipes") / "studies" / f"{recipe}.yaml"))
    path = Path(recipe)
    if not path.is_file():
        raise ConfigError(
            f"{recipe}: no such file, and no study of that name; expected a YAML file or one of "
            f"{', '.join(own_studies())}"
        )
    return path


def _describe(details: Any, document: Document) -> str:
    """One line about one thing that pydantic found."""
    loc: Loc = details["loc"]
    if loc[:1] == ("methods",):
        # Below methods.NAME.method pydantic has a level of its own, the method's name.
        loc = (*loc[:3], *loc[4:])
    where, name = document.place(loc), ".".join(map(str, loc))
    if details["type"] == "extra_forbidden":
        return f"{where}: {name}: unknown field; {_remedy(loc)}"
    if details["type"] == "missing":
        return f"{where}: {name}: is missing; add `{loc[-1]}:`{_told(loc)}"
    if details["type"] == "value_error":
        return f"{where}: {name + ': ' if name else ''}{details['ctx']['error']}"
    message = details["msg"].replace("Input should", "should", 1)
    return f"{where}: {name}: {message}, found {details.get('input')!r}{_told(loc)}"


def _remedy(loc: Loc) -> str:
    """What the unknown field at `loc` may have meant, or what is known there."""
    known = list(_fields(loc))
    near = difflib.get_close_matches(str(loc[-1]), known, n=1)
    return f"did you mean `{near[0]}`?" if near else f"expected one of {', '.join(known)} (docs/study.md)"


def _told(loc: Loc) -> str:
    """What the field at `loc` is for, in brackets; nothing where that is not known."""
    while loc and isinstance(loc[-1], int):  # an entry of a list
        loc = loc[:-1]
    says = purpose(_fields(loc).get(str(loc[-1]))) if loc else ""
    return f" ({says})" if says else ""


def _fields(loc: Loc) -> dict[str, FieldInfo]:
    """The fields that the block around `loc` may have, by name."""
    kinds: list[Any] = [StudyRecipe]
    for part in loc[:-1]:
        kinds = [inner for kind in kinds for inner in _inside(kind, part)]
    return {name: field for kind in kinds for name, field in getattr(kind, "model_fields", {}).items()}


def _inside(kind: Any, part: str | int) -> list[Any]:
    """The blocks and mappings that may be at `part` of a block, or of a mapping."""
    if get_origin(kind) is dict:
        return _blocks(get_args(kind)[1])
    field = kind.model_fields.get(str(part))
    return _blocks(field.annotation) if field else []


def _blocks(annotation: Any) -> list[Any]:
    if get_origin(annotation) is dict or (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return [annotation]
    return [block for part in get_args(annotation) for block in _blocks(part)]
