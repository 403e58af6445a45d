"""What a worker keeps between jobs: the base model, the evaluation engines, the reference for the drift."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hiplora.data.rows import hub_rows, is_hub_name, read_rows
from hiplora.errors import HipLoraError
from hiplora.study import pico  # noqa: F401 - makes `pico` a known model in every worker
from hiplora.study.jobs import Job
from hiplora.study.store import Store


@dataclass(frozen=True)
class Place:
    """Where a study's jobs find the model and the data, and whether they may run code that the model writes."""

    model: str
    data: Path | None = None
    allow_code: bool = False

    def absolute(self) -> "Place":
        """Return the same place for processes that run in another folder."""
        model = str(Path(self.model).resolve()) if Path(self.model).is_dir() else self.model
        return replace(self, model=model, data=self.data.resolve() if self.data else None)


def located(name: str, data: Path | None) -> str:
    """Return the path of a study's file: `name` in the data folder, else as it is (a path or hub name)."""
    return str(data / name) if data is not None and (data / name).is_file() else name


class Context:
    """A worker's tools. Models and engines are loaded on first use and kept."""

    def __init__(self, store: Store, place: Place):
        """Take a study's store and place; nothing is loaded yet."""
        self.store, self.place = store, place
        self.name, self.data = place.model, place.data
        self._model: tuple[Any, Any] | None = None
        self._engines: dict[str, Any] = {}
        self._references: dict[str, Any] = {}

    def model(self) -> tuple[Any, Any]:
        """Return the bare base model and its tokenizer; whoever changes the model restores it."""
        from hiplora.evaluation.mounting import load_model

        if self._model is None:
            self._model = load_model(self.name)
        return self._model

    def reset(self) -> None:
        """Drop the cached model; its state is unknown after a failure."""
        self._model = None
        self._references.clear()

    def path(self, name: str) -> str:
        """Return the path of a study's file, as `located`."""
        return located(name, self.data)

    def result(self, job: Job) -> dict[str, Any]:
        """Return a finished job's result."""
        found = self.store.result(job)
        if found is None:
            raise HipLoraError(f"{job.name}: is not finished, and another job reads it")
        return found

    def artifact(self, job: Job) -> Path:
        """Return a finished job's artifact."""
        return self.store.artifact(job)

    def engine(self, tasks: Mapping[str, int | None], seed: int) -> Any:
        """Return the evaluation engine of some tasks, each with its number of items (None: all)."""
        from hiplora.evaluation.evaluate import EvalSettings
        from hiplora.evaluation.suite import suite_of

        key = json.dumps([tasks, seed])
        if key not in self._engines:
            settings = EvalSettings("study", self.data, None, seed, allow_code=self.place.allow_code)
            self._engines[key] = settings.engine(suite_of("study", tasks, self.data))
        return self._engines[key]

    def reference(
        self, texts: Mapping[str, str], tokens: int, window: int, documents: int | None = None
    ) -> Any:
        """Return the bare base's predictions on the drift texts; ask for it before the model is changed.

        With `documents`, the first rows of each source are texts of their own.
        """
        from hiplora.evaluation import BaseReference

        key = json.dumps([texts, tokens, window, documents])
        if key not in self._references:
            contents = {
                name: self.text(source) if documents is None else self.documents(source, documents)
                for name, source in texts.items()
            }
            self._references[key] = BaseReference.build(
                *self.model(), contents, window=window, max_tokens=tokens
            )
        return self._references[key]

    def text(self, source: str) -> str:
        """Return a text: a .txt file, or FILE:FIELD+FIELD, the joined fields of its rows (`text` if none is named)."""
        name, _, fields = source.partition(":")
        path = Path(self.path(name))
        if not fields and path.suffix == ".txt":
            return path.read_text(encoding="utf-8")
        joint = "" if fields in ("", "text") else "\n"
        return joint.join(_row_text(row, fields) for _, row in read_rows(path))

    def documents(self, source: str, count: int) -> list[str]:
        """Return the first rows of a file or of a hub data set as texts; `source` as for `text`.

        Raises:
            DataError: the data set cannot be read.
        """
        name, _, fields = source.partition(":")
        path = self.path(name)
        rows = hub_rows(name) if is_hub_name(path) else read_rows(Path(path))
        return [_row_text(row, fields) for _, row in itertools.islice(rows, count)]


def _row_text(row: Mapping[str, Any], fields: str) -> str:
    return "".join(row[field] for field in (fields or "text").split("+"))
