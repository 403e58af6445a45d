"""How many and how long the rows, edits and items of a study are: counted in files that are there, else by `lengths`.

What a row or an edit of an unknown file takes is told by its characters, four to a token, as in English text.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hiplora.data.examples import DataSettings
from hiplora.data.rows import read_rows
from hiplora.editing.edits import BUILT_IN
from hiplora.evaluation.suite import task_settings
from hiplora.evaluation.tasks.rows import data_file
from hiplora.study.engine.bench import located
from hiplora.study.steps.lengths import (
    OTHER_EDITS,
    OTHER_ROWS,
    TASKS,
    EditLengths,
    RowLengths,
    edits_of,
    key_of,
    rows_of,
)

CHARACTERS = 4.0  # of a token
HELD_OUT = 256  # rows of a file that is not there


@dataclass(frozen=True)
class DataLengths:
    """What data come to: rows to train on and held-out ones, their mean length, the share of it that is learned."""

    rows: int
    held_out: int
    tokens: float
    learned: float


def data_of(block: Mapping[str, Any], data: Path | None) -> DataLengths:
    """Return what a recipe's block `data` comes to, its files named as in the data folder.

    Raises:
        DataError: a file is there and cannot be used.
    """
    files = {name: located(block[name], data) for name in ("path", "held_out") if block.get(name)}
    settings = DataSettings.model_validate({**block, **files})
    known = rows_of(settings.path or settings.hub or "", settings.template)
    if "path" not in files or not all(Path(file).is_file() for file in files.values()):
        return _told(settings, known, known.rows, HELD_OUT)
    changed = [_changed(Path(file)) for file in files.values()]
    if known is OTHER_ROWS or settings.max_characters is not None:
        found = _read(settings.model_dump_json(), *changed)
        return (
            found
            if known is OTHER_ROWS
            else replace(found, tokens=known.tokens, learned=_learned(settings, known))
        )
    counts = [_count(Path(file), number) for file, number in zip(files.values(), changed, strict=True)]
    return _told(settings, known, counts[0], counts[-1])


def edits_at(name: str, data: Path | None, limit: int | None, category: str | None = None) -> EditLengths:
    """Return what a job's edits come to: the first `limit`, of a category or of all; the file as in the data folder.

    Raises:
        DataError: the file is there and cannot be used, or it has fewer.
    """
    known, path = edits_of(name), Path(located(name, data))
    if name != BUILT_IN and not path.is_file():
        return replace(known, rows=min(limit or known.rows, known.rows))
    found = _edits(name if name == BUILT_IN else str(path), limit, category, _changed(path))
    return found if known is OTHER_EDITS else replace(known, rows=found.rows)


def items_of(task: str, data: Path | None) -> int | None:
    """Return how many items a task has: the rows of its file, else those that it has on the hub; None if not known.

    Raises:
        DataError: the file is there and cannot be read.
    """
    if task not in TASKS:
        return None
    path = data_file(data, task_settings(task)["file"]) if data is not None else None
    return TASKS[task].rows if path is None else _count(path, _changed(path))


def is_assumed(name: str, known: Mapping[str, object], data: Path | None) -> bool:
    """Whether a file or a data set of the hub is neither there nor `known`, by `lengths.ROWS` or `lengths.EDITS`."""
    return not key_of(name, known) and not Path(located(name, data)).is_file()


def _told(settings: DataSettings, known: RowLengths, rows: int, held_out_rows: int) -> DataLengths:
    """What known data come to, of a file of so many rows, or a held-out file of so many."""
    rows = settings.limit or rows if known is OTHER_ROWS else min(settings.limit or rows, rows)
    kept_back = round((settings.held_out_fraction or 0) * rows)
    held_out = held_out_rows if settings.held_out is not None else kept_back
    asked = min(held_out, settings.held_out_limit or held_out)
    return DataLengths(rows - kept_back, asked, known.tokens, _learned(settings, known))


def _learned(settings: DataSettings, known: RowLengths) -> float:
    return 1.0 if settings.learn_prompt else known.learned


@functools.lru_cache(maxsize=64)
def _read(settings: str, *changed: int) -> DataLengths:
    from hiplora.data.examples import load_data

    read = load_data(DataSettings.model_validate_json(settings))
    whole = sum(len(example.prompt + example.response) for example in read.train)
    learned = sum(
        len(example.response) + example.learn_prompt * len(example.prompt) for example in read.train
    )
    tokens = max(whole / len(read.train) / CHARACTERS, 1.0)
    return DataLengths(len(read.train), len(read.held_out), tokens, learned / max(whole, 1))


@functools.lru_cache(maxsize=64)
def _count(path: Path, changed: int) -> int:
    return sum(1 for _ in read_rows(path))


@functools.lru_cache(maxsize=64)
def _edits(source: str, limit: int | None, category: str | None, changed: int) -> EditLengths:
    from hiplora.editing import load_edits
    from hiplora.editing.measure import EXTRA_TOKENS

    edits = load_edits(source, limit, category=category).edits
    answers = [len(answer) / CHARACTERS for edit in edits for answer in (edit.new, edit.old)]
    prompts = [len(prompt) / CHARACTERS for edit in edits for prompt in (edit.prompt, edit.paraphrase)]
    answer = max(float(np.mean(answers)), 1.0)
    near = float(np.mean([len(edit.neighbours) for edit in edits]))
    written = math.ceil(max(answers)) + EXTRA_TOKENS
    return EditLengths(len(edits), float(np.mean(prompts)) + answer, answer, written, near)


def _changed(path: Path) -> int:
    return path.stat().st_mtime_ns if path.is_file() else 0
