"""Suites: which tasks a model is evaluated on. Nothing here imports torch or lm-eval."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, Field, PositiveInt, ValidationError

from hiplora.data.rows import SUFFIXES
from hiplora.errors import ConfigError, first_line, first_problem
from hiplora.evaluation.tasks.rows import data_file
from hiplora.files import parse_yaml

TASKS = Path(__file__).parent / "tasks"
SUITES = Path(__file__).parent / "suites"
PREFIX = "hiplora_"  # of the project's tasks in lm-eval, whose own names they must not hide


@dataclass(frozen=True)
class TaskRequest:
    """A task: its name in the suite and in lm-eval, how many items (None: all), and the file of the user's own rows."""

    name: str
    lm_eval: str
    limit: int | None = None
    rows: Path | None = None


@dataclass(frozen=True)
class Suite:
    """Tasks in order, and folders with task files beside the project's own."""

    name: str
    tasks: tuple[TaskRequest, ...]
    include: tuple[Path, ...] = ()


class _Entry(BaseModel, extra="forbid"):
    task: str = Field(min_length=1)
    limit: PositiveInt | None = None


_NameOrEntry = Annotated[_Entry, BeforeValidator(lambda value: {"task": value} if isinstance(value, str) else value)]


class _File(BaseModel, extra="forbid"):
    tasks: list[_NameOrEntry] = Field(min_length=1)
    include: list[str] = []


@functools.cache
def own_tasks() -> Mapping[str, Mapping[str, Any]]:
    """Return lm-eval's configuration of the project's tasks, by name; `metadata` has title, file, hub and score."""
    files = {path.stem: path.read_text(encoding="utf-8") for path in sorted(TASKS.glob("*.yaml"))}
    return {name: yaml.safe_load(text.replace("!function ", "")) for name, text in files.items()}


def own_suites() -> list[str]:
    """Return the names of the project's suites."""
    return sorted(path.stem for path in SUITES.glob("*.yaml"))


def task_samples(name: str) -> int:
    """Return how many responses per item one of the project's tasks samples; 1 for lm-eval's own."""
    return own_tasks().get(name, {}).get("repeats", 1)


def runs_code(task: str) -> bool:
    """Return whether one of the project's tasks runs code that the model writes; False for lm-eval's own."""
    return bool(own_tasks().get(task, {}).get("unsafe_code"))


def read_suite(suite: str, data: Path | None = None) -> Suite:
    """Read a suite: a name of `own_suites`, a YAML file, or comma-separated names of tasks.

    A task may be `a | b`: the first whose file is in the folder `data`, else `a`; or a file of the user's own rows, in
    a format of the training data. Other names are lm-eval's or those of the suite's `include` folders; lm-eval checks
    them. ConfigError, with what was expected, if the suite does not exist or is not valid.
    """
    if suite in own_suites():
        return _from_file(SUITES / f"{suite}.yaml", data)
    if suite.endswith((".yaml", ".yml")):
        return _from_file(Path(suite), data)
    names = [part.strip() for part in suite.split(",") if part.strip()]
    if not names:
        raise ConfigError(f"--suite {suite!r}: names no task; expected {_expected()}")
    return suite_of(suite, dict.fromkeys(names), data)


def suite_of(
    name: str, tasks: Mapping[str, int | None], data: Path | None = None, folder: Path = Path(), include: Sequence = ()
) -> Suite:
    """Return a suite of tasks, each with its number of items (None: all); names as in `read_suite`.

    Files of rows and the folders of `include` are relative to `folder`.
    """
    requests: dict[str, TaskRequest] = {}
    known = own_tasks()
    for task, limit in tasks.items():
        if suffix := next((suffix for suffix in SUFFIXES if task.endswith(suffix)), ""):
            file = folder / task
            if not file.is_file():
                raise ConfigError(f"--suite: {file}: no such file; expected {_expected()}")
            key = file.name.removesuffix(suffix)
            request = TaskRequest(key, key, limit, file)
        else:
            options = [option.strip() for option in task.split("|")]
            stored = [o for o in options if data and o in known and data_file(data, known[o]["metadata"]["file"])]
            key = (stored or options)[0]
            request = TaskRequest(key, f"{PREFIX}{key}" if key in known else key, limit)
        if (first := requests.setdefault(key, request)).rows != request.rows:
            raise ConfigError(f"--suite: two files are called {key}; rename one of them")
        if first is not request:
            raise ConfigError(f"--suite: task {key} is listed twice; keep one of the two")
    return Suite(name, tuple(requests.values()), tuple(folder / path for path in include))


def _from_file(path: Path, data: Path | None) -> Suite:
    try:
        file = _File.model_validate(parse_yaml(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ConfigError(f"--suite {path}: no such file; expected {_expected()}") from None
    except ValidationError as error:
        raise ConfigError(
            f"--suite {path}: {first_problem(error)}; expected `tasks:`, a list of names or of {{task, limit}}, and "
            "optionally `include:`, a list of folders"
        ) from None
    except ValueError as error:
        raise ConfigError(f"--suite {path}: is not YAML that can be read ({first_line(error)})") from None
    for name in file.include:
        if not (path.parent / name).is_dir():
            raise ConfigError(f"--suite {path}: include: {path.parent / name} is not a folder")
    names = [entry.task for entry in file.tasks]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"--suite {path}: task {twice[0]} is listed twice; keep one of the two")
    return suite_of(path.stem, {entry.task: entry.limit for entry in file.tasks}, data, path.parent, file.include)


def _expected() -> str:
    return (
        f"a suite ({', '.join(own_suites())}), a YAML file, a file of your own rows ({', '.join(SUFFIXES)}), or "
        f"comma-separated tasks ({', '.join(own_tasks())}, or lm-eval's own)"
    )
