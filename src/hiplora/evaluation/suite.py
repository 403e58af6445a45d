"""Suites: which tasks a model is evaluated on. Nothing here imports torch or lm-eval."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hiplora.errors import ConfigError
from hiplora.evaluation.tasks.rows import data_file

TASKS = Path(__file__).parent / "tasks"
SUITES = Path(__file__).parent / "suites"
PREFIX = "hiplora_"  # lm-eval's names of the project's tasks, which must not hide its own


@dataclass(frozen=True)
class TaskRequest:
    """A task by its name in the suite, its name for lm-eval, and how many of its items are taken (None: all)."""

    name: str
    lm_eval: str
    limit: int | None = None


@dataclass(frozen=True)
class Suite:
    """Tasks in order, and the folders with their YAML files beside the project's own."""

    name: str
    tasks: tuple[TaskRequest, ...]
    include: tuple[Path, ...] = ()


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")
    task: str = Field(min_length=1)
    limit: Annotated[int, Field(ge=1)] | None = None


class _File(BaseModel):
    """A suite file: `tasks`, each a name or {task, limit}, and `include`, folders with lm-eval task files."""

    model_config = ConfigDict(extra="forbid")
    tasks: list[str | _Entry] = Field(min_length=1)
    include: list[str] = []


def own_tasks() -> list[str]:
    """Return the names of the project's tasks."""
    return sorted(path.stem for path in TASKS.glob("*.yaml"))


def own_suites() -> list[str]:
    """Return the names of the project's suites."""
    return sorted(path.stem for path in SUITES.glob("*.yaml"))


def task_settings(name: str) -> Mapping[str, Any]:
    """Return the `metadata` of one of the project's tasks: title, file, hub, and which metric is its score."""
    return _own_task(name)["metadata"]


def task_samples(name: str) -> int:
    """Return how many responses to an item one of the project's tasks samples; 1 for tasks of lm-eval's own."""
    return int(_own_task(name).get("repeats", 1)) if name in own_tasks() else 1


@functools.cache
def _own_task(name: str) -> Mapping[str, Any]:
    return yaml.safe_load((TASKS / f"{name}.yaml").read_text().replace("!function ", ""))


def most_written(task: str) -> tuple[int, int]:
    """Return how many tokens a task of the project's lets a model write for an item at most, and how many samples.

    0 and 1 for tasks that are answered by likelihood; of lm-eval's own nothing is known here.
    """
    if task not in own_tasks():
        return 0, 1
    settings = _own_task(task)
    return settings.get("generation_kwargs", {}).get("max_gen_toks", 0), settings.get("repeats", 1)


def read_suite(suite: str, data: Path | None = None) -> Suite:
    """Read a suite: a name of `own_suites`, a YAML file, or names of tasks with commas between.

    A task may be `a | b`: the first whose file is in the folder `data`, else the first. Names that are not the
    project's own are lm-eval's, or those of the files that the suite includes; whether they exist is for lm-eval to
    say.

    Raises:
        ConfigError: no such suite or file, or the file is not one; it names the place and what was expected.
    """
    path = Path(suite)
    if suite in own_suites():
        return _from_file(SUITES / f"{suite}.yaml", suite, data)
    if path.suffix in (".yaml", ".yml"):
        return _from_file(path, path.stem, data)
    entries = [_Entry(task=part.strip()) for part in suite.split(",") if part.strip()]
    if not entries:
        raise ConfigError(f"--suite {suite!r}: names no task; expected {_expected()}")
    return Suite(suite, _requests(entries, data))


def suite_of(name: str, tasks: Mapping[str, int | None], data: Path | None = None) -> Suite:
    """Return a suite of tasks, each with how many of its items are taken (None: all); names as for `read_suite`."""
    return Suite(name, _requests([_Entry(task=task, limit=limit) for task, limit in tasks.items()], data))


def _from_file(path: Path, name: str, data: Path | None) -> Suite:
    try:
        found = _File.model_validate(yaml.safe_load(path.read_text()))
    except FileNotFoundError:
        raise ConfigError(f"--suite {path}: no such file; expected {_expected()}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--suite {path}: is not YAML ({str(error).splitlines()[0]})") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(
            f"--suite {path}: {place}: {first['msg']}; expected `tasks:`, a list of names or of {{task, limit}}, and "
            "`include:`, a list of folders"
        ) from None
    include = tuple(path.parent / folder for folder in found.include)
    for folder in include:
        if not folder.is_dir():
            raise ConfigError(f"--suite {path}: include: {folder} is no folder")
    entries = [_Entry(task=entry) if isinstance(entry, str) else entry for entry in found.tasks]
    return Suite(name, _requests(entries, data), include)


def _requests(entries: Sequence[_Entry], data: Path | None) -> tuple[TaskRequest, ...]:
    known, requests = set(own_tasks()), {}
    for entry in entries:
        name = _at_hand([option.strip() for option in entry.task.split("|")], known, data)
        requests[name] = TaskRequest(name, f"{PREFIX}{name}" if name in known else name, entry.limit)
    return tuple(requests.values())


def _at_hand(options: Sequence[str], known: set[str], data: Path | None) -> str:
    if data is not None:
        for option in options:
            if option in known and data_file(data, task_settings(option)["file"]):
                return option
    return options[0]


def _expected() -> str:
    return (
        f"a suite ({', '.join(own_suites())}), a YAML file, or tasks with commas between ({', '.join(own_tasks())}, or "
        "lm-eval's own)"
    )


def runs_code(task: str) -> bool:
    """Whether one of the project's tasks runs code that the model writes; of lm-eval's own nothing is known here."""
    return task in own_tasks() and bool(_own_task(task).get("unsafe_code"))
