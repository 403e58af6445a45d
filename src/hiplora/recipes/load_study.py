"""Read a study's recipe: a YAML file, or one of those that come with hiplora by its name."""

import importlib.resources
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hiplora.errors import ConfigError
from hiplora.recipes.study import StudyRecipe
from hiplora.training.recipe import described, put_over, read_yaml, refusal


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
    value = _extended(read_yaml(path), path)
    for override in overrides:  # over what the recipe extends, too
        put_over(value, override)
    model = value.get("model")
    if isinstance(model, str) and model.startswith((".", "/", "~")):
        value["model"] = os.path.normpath(path.resolve().parent / Path(model).expanduser())
    try:
        return StudyRecipe.model_validate(value)
    except ValidationError as error:
        raise refusal(path, described(error, StudyRecipe)) from None


def _extended(value: dict[str, Any], *paths: Path) -> dict[str, Any]:
    """Return a recipe's values over those of the recipe that it `extends`, block by block; a null takes one out."""
    value = dict(value)
    parent = value.pop("extends", None)
    if parent is None:
        return value
    if not isinstance(parent, str):
        raise ConfigError(f"{paths[-1]}: extends is {parent!r}; expected one recipe, a name or a file")
    beside = paths[-1].resolve().parent / parent
    path = beside if beside.is_file() else _find(parent)
    if path.resolve() in {one.resolve() for one in paths}:
        raise ConfigError(
            f"{paths[-1]}: extends {parent}, which extends this recipe itself; break the circle"
        )
    return _over(_extended(read_yaml(path), *paths, path), value)


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
