"""A YAML document with the line of every key, so that an error can point at it; and `--set` on top of it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from hiplora.errors import ConfigError

Loc = tuple[str | int, ...]  # ("train", "lr"): where in the document


class _Loader(yaml.SafeLoader):
    """YAML as people write it: `1e-3` is a number (YAML 1.2), which PyYAML's 1.1 reads as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


@dataclass
class Document:
    """The values of a recipe, the place that each came from, and what was wrong with the writing itself."""

    value: dict[str, Any]
    folder: Path
    name: str
    places: dict[Loc, str] = field(default_factory=dict)
    overridden: set[Loc] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    def place(self, loc: Loc) -> str:
        """Where `loc` was written; for something that is missing, where its parent was."""
        for end in range(len(loc), 0, -1):
            if loc[:end] in self.places:
                return self.places[loc[:end]]
        return self.name

    def is_overridden(self, loc: Loc) -> bool:
        """Whether `loc`, or a block around it, comes from the command line."""
        return any(loc[:end] in self.overridden for end in range(1, len(loc) + 1))


def refusal(path: Path, problems: Sequence[str]) -> ConfigError:
    """Return the error that lists all problems of the recipe at `path`."""
    count = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
    return ConfigError(f"{path}: {count}\n" + "\n".join(f"  {text}" for text in problems))


def purpose(field: FieldInfo | None) -> str:
    """Return what a field is for, the first sentence of its description; nothing where that is not known."""
    return (field.description or "").split(". ")[0].rstrip(".") if field else ""


def read_document(path: Path, overrides: Sequence[str] = ()) -> Document:
    """Read a YAML file and put the overrides (`a.b=value`) over it.

    Raises:
        ConfigError: the file is missing or unreadable, is not YAML, is no mapping, or an override is malformed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise ConfigError(f"{path}: the recipe cannot be read: {reason}; check the path") from None
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        document = Document(value={}, folder=path.resolve().parent, name=str(path))
        if isinstance(node, yaml.MappingNode):
            _note_lines(node, (), document)
            document.value = loader.construct_document(node)
        elif node is not None:
            raise ConfigError(f"{path}, line 1: expected a mapping (`model: …`), found something else")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(
            f"{path}{line}: not valid YAML: {error.problem or error.context}; mend the line"
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    finally:
        loader.dispose()
    for override in overrides:
        put_over(document, override)
    return document


def _note_lines(node: yaml.Node, loc: Loc, document: Document) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                document.problems.append(
                    f"{document.name}, line {line}: `{key.value}` stands here and in line {seen[key.value]}; keep one"
                )
            seen[key.value] = line
            document.places[(*loc, key.value)] = f"{document.name}, line {line}"
            _note_lines(value, (*loc, key.value), document)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            document.places[(*loc, index)] = f"{document.name}, line {item.start_mark.line + 1}"
            _note_lines(item, (*loc, index), document)


def put_over(document: Document, text: str) -> None:
    """Put one `a.b=value` over the document, in place; the value is read as YAML.

    Raises:
        ConfigError: it is malformed, or `a` is no block.
    """
    key, equals, raw = text.partition("=")
    parts = tuple(key.strip().split("."))
    if not equals or not all(parts):
        raise ConfigError(f"--set {text}: expected key=value, for example --set train.lr=1e-4")
    try:
        value = yaml.load(raw, Loader=_Loader)
    except yaml.YAMLError:
        raise ConfigError(f"--set {text}: the value is not valid YAML; quote it") from None
    block = document.value
    for depth, part in enumerate(parts[:-1], start=1):
        inner = block.get(part)
        if inner is None:
            inner = {}
        elif isinstance(inner, str) and part in ("method", "data"):
            inner = {"name" if part == "method" else "path": inner}
        elif not isinstance(inner, dict):
            raise ConfigError(f"--set {text}: {'.'.join(parts[:depth])} is not a block but {inner!r}")
        block[part] = inner
        block = inner
    block[parts[-1]] = value
    for loc in [loc for loc in document.places if loc[: len(parts)] == parts]:
        del document.places[loc]
    document.places[parts] = f"--set {text}"
    document.overridden.add(parts)
