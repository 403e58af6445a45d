"""Read a recipe and check all of it, files included, before anything heavy is loaded."""

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from hiplora.errors import DataError
from hiplora.recipes.document import Document, Loc, purpose, read_document, refusal
from hiplora.recipes.methods import METHODS
from hiplora.recipes.rows import is_hub_name, read_rows
from hiplora.recipes.schema import DataSettings, TrainRecipe, TrainSettings, expand_short_forms
from hiplora.recipes.shapes import check_rows
from hiplora.recipes.start import start_problems

BLOCKS: dict[Loc, type[BaseModel]] = {
    (): TrainRecipe,
    ("data",): DataSettings,
    ("train",): TrainSettings,
}
PATHS: tuple[Loc, ...] = (("out",), ("data", "path"), ("data", "held_out"), ("train", "start_from"))
TEXTS: tuple[Loc, ...] = (("method", "calibration_text"), ("train", "kl_text"))


def load_recipe(path: str | os.PathLike, overrides: Sequence[str] = ()) -> TrainRecipe:
    """Read a training recipe from YAML, put `overrides` (`train.lr=1e-4`) over it, and check all of it.

    Relative paths in the file are relative to the file, those in overrides to the current folder. Data files
    are read to the end, so that a row without its fields is found here and not after the model is loaded.

    Raises:
        ConfigError: something is wrong; the message lists everything that is, with file, line and remedy.
    """
    path = Path(path)
    document = read_document(path, overrides)
    value = expand_short_forms(document.value)
    _resolve_paths(value, document)
    recipe, problems = _validate(value, document)
    problems = document.problems + problems
    model = value.get("model")
    problems += [f"{document.place(('model',))}: {text}" for text in model_problems(model)]
    problems += _data_problems(recipe.data if recipe else _data_alone(value), document)
    problems += _file_problems(recipe, document) if recipe else []
    if problems or recipe is None:
        problems.sort(key=_line)
        raise refusal(path, problems)
    return recipe


def _line(problem: str) -> int:
    found = re.search(r", line (\d+): ", problem)
    return int(found.group(1)) if found else 0


def model_problems(model: Any) -> list[str]:
    """Say what is wrong with a model's folder; a name on the hub is taken on trust until it is loaded."""
    if not isinstance(model, str) or not _is_path(model):
        return []
    folder = Path(model)
    if not folder.is_dir():
        return [f"model: no such folder: {folder}; check the path, or give a name on the hub (owner/name)"]
    if not (folder / "config.json").is_file():
        return [f"model: {folder} has no config.json; name a folder that `save_pretrained` wrote"]
    return []


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~", os.sep)) or os.path.isdir(name) or name.count("/") > 1


def _resolve_paths(value: dict[str, Any], document: Document) -> None:
    """Make the paths of a recipe absolute, in place; a text may be a data set of the hub instead."""
    for name in ("data", "method", "train"):
        if isinstance(value.get(name), dict):
            value[name] = dict(value[name])
    for loc in PATHS + TEXTS:
        block, name = (value.get(str(loc[0])) if len(loc) > 1 else value), str(loc[-1])
        given = block.get(name) if isinstance(block, dict) else None
        if isinstance(block, dict) and isinstance(given, str) and given:
            where = _absolute(given, loc, document)
            if loc in PATHS or Path(where).exists() or not is_hub_name(given):
                block[name] = where
    model = value.get("model")
    if isinstance(model, str) and model:
        where = _absolute(model, ("model",), document)
        if _is_path(model) or os.path.isdir(where):
            value["model"] = where


def _absolute(text: str, loc: Loc, document: Document) -> str:
    base = Path.cwd() if document.is_overridden(loc) else document.folder
    return os.path.normpath(base / Path(text).expanduser())


def _validate(value: dict[str, Any], document: Document) -> tuple[TrainRecipe | None, list[str]]:
    try:
        return TrainRecipe.model_validate(value), []
    except ValidationError as error:
        return None, [_describe(details, document) for details in error.errors()]


def _data_alone(value: dict[str, Any]) -> DataSettings | None:
    """The data block, if it is sound by itself: then its files are checked even where the rest has errors."""
    data = value.get("data")
    if not isinstance(data, dict):
        return None
    try:
        return DataSettings.model_validate({k: v for k, v in data.items() if k in DataSettings.model_fields})
    except ValidationError:
        return None


def _data_problems(data: DataSettings | None, document: Document) -> list[str]:
    if data is None:
        return []
    problems = []
    for key in ("path", "held_out"):
        source = getattr(data, key)
        if source is None:
            continue
        try:
            check_rows(read_rows(Path(source)), data.format, source)
        except (DataError, OSError) as error:
            text = str(error).replace("\n", "\n    ")
            problems.append(f"{document.place(('data', key))}: data.{key}: {text}")
    return problems


def _file_problems(recipe: TrainRecipe, document: Document) -> list[str]:
    """Say what is wrong with the texts and the adapter that a recipe names."""
    problems = []
    for block, name in TEXTS:
        text = getattr(getattr(recipe, str(block)), str(name), None)
        if text is not None and not Path(text).is_file() and not is_hub_name(text):
            where = document.place((block, name))
            problems.append(f"{where}: {block}.{name}: no such file: {text}; correct the path")
    if recipe.train.start_from is not None:
        where = document.place(("train", "start_from"))
        found = start_problems(recipe.method, recipe.train.start_from)
        problems += [f"{where}: train.start_from: {text}" for text in found]
    return problems


def _describe(details: Any, document: Document) -> str:
    """One line about one thing that pydantic found: where, which field, what, and what to do."""
    loc = _without_tag(details["loc"])
    where, name = document.place(loc), ".".join(map(str, loc))
    kind, given = details["type"], details.get("input")
    if kind == "extra_forbidden":
        return f"{where}: {name}: unknown field{_hint(loc, document)}"
    if kind == "missing":
        return f"{where}: {name}: is missing; add `{loc[-1]}:` ({_description(loc)})"
    if kind == "union_tag_invalid":
        tag = given.get("name") if isinstance(given, dict) else given
        near = difflib.get_close_matches(str(tag), METHODS, n=1)
        meant = f"; did you mean `{near[0]}`?" if near else ""
        return f"{where}: {name}: unknown method {tag!r}; expected one of {', '.join(METHODS)}{meant}"
    if kind == "value_error":
        return f"{where}: {name + ': ' if name else ''}{details['ctx']['error']}"
    message = details["msg"].replace("Input should", "should", 1)
    description = _description(loc)
    return f"{where}: {name}: {message}, found {given!r}" + (f" ({description})" if description else "")


def _without_tag(loc: Loc) -> Loc:
    """Pydantic puts the method's name into the place of an error; the document has no such level."""
    if len(loc) > 1 and loc[0] == "method" and loc[1] in METHODS:
        return (loc[0], *loc[2:])
    return loc


def _block(loc: Loc, document: Document) -> type[BaseModel] | None:
    if loc == ("method",):
        value = expand_short_forms(document.value).get("method")
        return METHODS.get(value.get("name", "")) if isinstance(value, dict) else None
    return BLOCKS.get(loc)


def _hint(loc: Loc, document: Document) -> str:
    """What an unknown field may have meant: another method's, one of another block, or a slip of the keyboard."""
    block, name = _block(loc[:-1], document), str(loc[-1])
    if block is None:
        return ""
    if loc[0] == "method":
        owners = [method for method, model in METHODS.items() if name in model.model_fields]
        if owners:
            return f" of this method: it belongs to {', '.join(owners)}; remove it or change method.name"
    near = difflib.get_close_matches(name, block.model_fields, n=1, cutoff=0.6)
    if near:
        return f"; did you mean `{near[0]}`?"
    blocks: list[tuple[Loc, type[BaseModel]]] = [*BLOCKS.items()]
    blocks += [(("method",), model) for model in METHODS.values()]
    for at, model in blocks:
        if name in model.model_fields:
            return f"; did you mean `{'.'.join((*map(str, at), name))}`?"
    return f"; expected one of {', '.join(block.model_fields)}"


def _description(loc: Loc) -> str:
    block = BLOCKS.get(loc[:-1]) if loc else None
    if loc[:1] == ("method",) and len(loc) > 1:
        block = next((model for model in METHODS.values() if loc[1] in model.model_fields), None)
        loc = loc[:2]
    return purpose(block.model_fields.get(str(loc[-1])) if block else None)
