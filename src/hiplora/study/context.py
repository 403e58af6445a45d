"""Where a study is, and what a worker keeps between jobs: the base model, the engines, the reference for the drift."""

import itertools
import json
import multiprocessing
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hiplora.data.rows import hub_rows, is_hub_name, read_rows
from hiplora.study import pico  # noqa: F401 - makes `pico` a known model in every worker
from hiplora.study.store import Store


@dataclass(frozen=True)
class Place:
    """Where a study's jobs find results, model and data, and whether they may run code that the model writes."""

    folder: Path
    model: str
    data: Path | None = None
    allow_code: bool = False


def located(name: str, data: Path | None) -> str:
    """Return the path of a study's file: `name` in the data folder, else as it is (a path or hub name)."""
    return str(data / name) if data is not None and (data / name).is_file() else name


class Context:
    """A worker's tools, loaded on first use and kept: what imports torch only after `execute` has set its threads."""

    def __init__(self, place: Place):
        self.place, self.store = place, Store(place.folder)
        self._model: tuple[Any, Any] | None = None
        self._engines: dict[str, Any] = {}
        self._references: dict[str, Any] = {}

    def model(self) -> tuple[Any, Any]:
        """Return the bare base model and its tokenizer; whoever changes the model restores it."""
        from hiplora.evaluation.mounting import load_model

        if self._model is None:
            self._model = load_model(self.place.model)
        return self._model

    def reset(self) -> None:
        """Drop the cached model; its state is unknown after a failure."""
        self._model = None
        self._references.clear()

    def engine(self, tasks: Mapping[str, int | None], seed: int) -> Any:
        """Return the evaluation engine of some tasks, each with its number of items (None: all)."""
        from hiplora.evaluation.evaluate import EvalSettings
        from hiplora.evaluation.suite import suite_of

        key, data = json.dumps([tasks, seed]), self.place.data
        if key not in self._engines:
            settings = EvalSettings("study", data, None, seed, allow_code=self.place.allow_code)
            self._engines[key] = settings.engine(suite_of("study", tasks, data), self.model()[1])
        return self._engines[key]

    def reference(self, texts: Mapping[str, str], tokens: int, window: int, documents: int | None = None) -> Any:
        """Return the bare base's predictions on the drift texts; ask for it before the model is changed."""
        from hiplora.evaluation import BaseReference

        key = json.dumps([texts, tokens, window, documents])
        if key not in self._references:
            contents = {name: self.text(source, documents) for name, source in texts.items()}
            self._references[key] = BaseReference.build(*self.model(), contents, window=window, max_tokens=tokens)
        return self._references[key]

    def text(self, source: str, documents: int | None = None) -> str | list[str]:
        """Return a drift text: all rows joined or, with `documents`, so many first rows as texts of their own.

        `source` is a .txt file, FILE:FIELD+FIELD (`text` if none is named), or a data set on the hub. DataError if the
        data set cannot be read.
        """
        name, _, named = source.partition(":")
        path, fields = located(name, self.place.data), (named or "text").split("+")
        if documents is None and not named and path.endswith(".txt"):
            return Path(path).read_text(encoding="utf-8")
        rows = hub_rows(name) if is_hub_name(path) else read_rows(Path(path))
        texts = ["".join(row[field] for field in fields) for _, row in itertools.islice(rows, documents)]
        if documents is not None:
            return texts
        return ("" if fields == ["text"] else "\n").join(texts)


def start_child() -> None:
    """Prepare a process that was started for jobs: quiet, and ended when its parent ends, however that ended."""

    def exit_with_parent() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    os.environ["TQDM_DISABLE"] = "1"  # the study has one bar
    os.dup2(2, 1)  # libraries print to standard error, which leaves standard output to --json
    threading.Thread(target=exit_with_parent, daemon=True).start()
