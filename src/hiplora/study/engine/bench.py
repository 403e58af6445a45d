"""What a worker process keeps between jobs: the base model, the evaluation engines, the texts of the drift."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hiplora.data.rows import hub_rows, is_hub_name, read_rows
from hiplora.errors import HipLoraError
from hiplora.evaluation.evaluate import EvalSettings
from hiplora.evaluation.mounting import load_model
from hiplora.evaluation.suite import suite_of
from hiplora.study.engine.jobs import Job
from hiplora.study.engine.store import Store


@dataclass(frozen=True)
class Place:
    """Where a study's jobs find the model and the data, and whether they may run code that the model writes."""

    model: str
    data: Path | None = None
    allow_code: bool = False

    def absolute(self) -> "Place":
        """Return the same place for processes that run in another folder."""
        model = str(Path(self.model).resolve()) if Path(self.model).is_dir() else self.model
        return Place(model, self.data.resolve() if self.data else None, self.allow_code)

    def to_json(self) -> dict[str, Any]:
        """Return the place as JSON values, which `from_json` reads."""
        return {
            "model": self.model,
            "data": str(self.data) if self.data else None,
            "allow_code": self.allow_code,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Place":
        """Read what `to_json` wrote."""
        return cls(value["model"], Path(value["data"]) if value["data"] else None, value["allow_code"])


def located(name: str, data: Path | None) -> str:
    """Return where a file of a study is: `name` in the data folder, else as it stands (a path, a hub name)."""
    if data is not None and (data / name).is_file():
        return str(data / name)
    return name


class Bench:
    """A worker's tools. Models and engines are loaded when first asked for, and kept."""

    def __init__(self, store: Store, place: Place):
        """Make a bench over a study's store; file names of the study are relative to the place's data folder."""
        self.store = store
        self.name, self.data, self.allow_code = place.model, place.data, place.allow_code
        self._network: Any = None
        self._tokenizer: Any = None
        self._engines: dict[str, Any] = {}
        self._references: dict[str, Any] = {}

    def model(self) -> tuple[Any, Any]:
        """Return the bare base model and its tokenizer; who changes it puts it back."""
        if self._network is None:
            self._network, self._tokenizer = load_model(self.name)
        return self._network, self._tokenizer

    def reset(self) -> None:
        """Let the model go: after a failure nobody knows what is left on it."""
        self._network = self._tokenizer = None
        self._references.clear()

    def path(self, name: str) -> str:
        """Return where a file of the study is; as `located`."""
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
        key = json.dumps([tasks, seed])
        if key not in self._engines:
            settings = EvalSettings("study", self.data, None, seed, allow_code=self.allow_code)
            self._engines[key] = settings.engine(suite_of("study", tasks, self.data))
        return self._engines[key]

    def reference(
        self, texts: Mapping[str, str], tokens: int, window: int, documents: int | None = None
    ) -> Any:
        """Return what the bare base makes of the drift texts; to be asked for while nothing is on the model.

        With `documents`, the first so many rows of each source are texts of their own.
        """
        from hiplora.study.measure import base_reference

        key = json.dumps([texts, tokens, window, documents])
        if key not in self._references:
            network, tokenizer = self.model()
            contents = {
                name: self.text(source) if documents is None else self.documents(source, documents)
                for name, source in texts.items()
            }
            self._references[key] = base_reference(network, tokenizer, contents, tokens, window)
        return self._references[key]

    def text(self, source: str) -> str:
        """Return a text: a file's `text`, or FILE:FIELD+FIELD, those fields of its rows, one after the other."""
        name, _, fields = source.partition(":")
        path = Path(self.path(name))
        if not fields and path.suffix == ".txt":
            return path.read_text(encoding="utf-8")
        joint = "" if fields in ("", "text") else "\n"
        return joint.join(_row_text(row, fields) for _, row in read_rows(path))

    def documents(self, source: str, count: int) -> list[str]:
        """Return the first rows of a file or of a data set of the hub as texts; `source` as for `text`.

        Raises:
            DataError: the data set cannot be read.
        """
        name, _, fields = source.partition(":")
        path = self.path(name)
        rows = hub_rows(name) if is_hub_name(path) else read_rows(Path(path))
        return [_row_text(row, fields) for _, row in itertools.islice(rows, count)]


def _row_text(row: Mapping[str, Any], fields: str) -> str:
    return "".join(row[field] for field in (fields or "text").split("+"))
