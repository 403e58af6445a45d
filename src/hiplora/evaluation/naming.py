"""What the adapters of a command are called in its results."""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

from hiplora.errors import ConfigError

BASE = "base"  # the base model's own name, which no adapter gets


def name_adapters(adapters: Sequence[str | os.PathLike]) -> dict[str, Path]:
    """Return name → folder of adapters given as FOLDER or NAME=FOLDER.

    A folder alone is called by its own name; where that is taken, its parent's stands before it, or a number behind.

    Raises:
        ConfigError: a given name is taken.
    """
    named: dict[str, Path] = {}
    for given in adapters:
        name, folder = split_name(given)
        taken = {BASE, *named}
        if name is not None and name in taken:
            raise ConfigError(f"adapter {given}: the name {name!r} is taken; give it another")
        named[name or _free_name(folder.resolve(), taken)] = folder
    return named


def _free_name(folder: Path, taken: set[str]) -> str:
    options = (folder.name, f"{folder.parent.name}/{folder.name}")
    numbered = (f"{folder.name} ({number})" for number in itertools.count(2))
    return next(name for name in itertools.chain(options, numbered) if name not in taken)


def split_name(given: str | os.PathLike) -> tuple[str | None, Path]:
    """Split NAME=FOLDER; a folder alone has no name, and one whose own name holds a = is meant as it is."""
    text = os.fspath(given)
    name, equals, folder = text.partition("=")
    if not equals or Path(text).exists():
        return None, Path(text)
    return name, Path(folder)
