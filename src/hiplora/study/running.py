"""Run a study: everything that is missing, wherever it was interrupted; how far it is, and what failed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hiplora.errors import ConfigError, DataError, first_problem
from hiplora.evaluation.suite import own_tasks, runs_code
from hiplora.merging.rules import find_rule as merge_rule
from hiplora.models.shapes import model_shape
from hiplora.recipes.study import StudyRecipe
from hiplora.study.builder import Study
from hiplora.study.engine.bench import Place
from hiplora.study.engine.jobs import Graph
from hiplora.study.engine.local import run_local
from hiplora.study.engine.store import Store
from hiplora.study.engine.todo import Todo
from hiplora.study.pico_data import write_pico_data
from hiplora.study.plan import methods_of, open_jobs
from hiplora.study.protocols import graph as all_jobs
from hiplora.study.steps.loads import load_of

PICO = "pico"


@dataclass(frozen=True)
class Opened:
    """A study at its folder: the recipe's jobs, the store, and where its jobs find things."""

    study: Study
    graph: Graph
    store: Store
    place: Place


@dataclass(frozen=True)
class Executor:
    """Where jobs run: `local` in `workers` processes, or on a `ray` cluster at `address`."""

    name: str = "local"
    workers: int = 1
    address: str | None = None
    gpus_per_job: float = 0.0


def open_study(
    recipe: StudyRecipe, folder: str | Path, data: str | Path | None, allow_code: bool = False
) -> Opened:
    """Return a study's jobs and its store in `folder`; nothing is written, but the data of the `pico` study.

    Raises:
        DataError: there is no such data folder.
        ConfigError: `folder` is no folder, or the recipe's parts do not fit each other or the merge rules.
    """
    if Path(folder).exists() and not Path(folder).is_dir():
        raise ConfigError(f"--out {folder}: is a file; name the folder of the study's results")
    _check_rules(recipe)
    place = Path(data) if data is not None else None
    if place is None and recipe.model == PICO:
        place = Path(folder) / "data"
        write_pico_data(place)
    if place is not None and not place.is_dir():
        raise DataError(f"--data {place}: no such folder; name the one with the study's files")
    study = Study(recipe, place)
    try:
        graph = all_jobs(study)
    except ValidationError as error:  # settings that fit alone, and not together
        raise ConfigError(f"study {recipe.study}: a job of it cannot be: {first_problem(error)}") from None
    return Opened(study, graph, Store(Path(folder)), Place(recipe.model, place, allow_code))


def run(
    opened: Opened,
    executor: Executor,
    on_progress: Callable[[Progress, dict[str, Any]], None] | None = None,
) -> Todo:
    """Do what is missing and return what is left: what failed, and what hangs on it.

    May be killed at any moment and called again, by several processes at once, too. `on_progress` is told how far the
    study is after every event.

    Raises:
        DataError: files that the recipe names are missing.
        ConfigError: a method does not fit the model; tasks run what the model writes, and that was not allowed; or as
            `run_ray`.
    """
    check(opened)
    progress = Progress(opened, executor)

    def heard(event: dict[str, Any]) -> None:
        progress.hear(event)
        if on_progress is not None:
            on_progress(progress, event)

    if executor.name == "ray":
        from hiplora.study.engine.grid import run_ray

        return run_ray(
            opened.graph,
            opened.store,
            opened.place,
            executor.address,
            workers=executor.workers,
            gpus_per_job=executor.gpus_per_job,
            on_event=heard,
        )
    return run_local(opened.graph, opened.store, opened.place, executor.workers, heard)


def check(opened: Opened) -> None:
    """Raise what would make jobs fail: methods that do not fit, missing files, unknown tasks, code that may not run."""
    methods_of(opened.study)
    if missing := list(opened.study.missing):
        where = f" in {opened.place.data}" if opened.place.data else "; name their folder with --data"
        raise DataError(f"files of the study are missing{where}: {', '.join(missing)}")
    check_tasks(opened.graph)
    risky = sorted(task for task in _tasks(opened.graph) if runs_code(task))
    if risky and not opened.place.allow_code:
        raise ConfigError(
            f"tasks {', '.join(risky)} run code that the model writes; allow it with --allow-code-execution "
            "(docs/code-sandbox.md), or take them out of the recipe"
        )


def check_tasks(graph: Graph) -> None:
    """Check that every task is one of the project's or of lm-eval's; only where there are such is lm-eval asked.

    Raises:
        ConfigError: tasks are not known; they are named.
    """
    foreign = _tasks(graph) - set(own_tasks())
    if not foreign:
        return
    from hiplora.evaluation.engine import foreign_tasks

    if unknown := sorted(foreign - foreign_tasks()):
        raise ConfigError(
            f"tasks that nobody knows: {', '.join(unknown)}; expected one of {', '.join(own_tasks())}, or one of "
            "lm-eval's (lm_eval ls tasks)"
        )


def _tasks(graph: Graph) -> set[str]:
    return {task for job in graph for task in job.settings.get("tasks") or ()}


def _check_rules(recipe: StudyRecipe) -> None:
    for name, settings in recipe.protocols:
        for rule, options in getattr(settings, "rules", {}).items():
            try:
                merge_rule(rule).options(options)
            except ConfigError as error:
                raise ConfigError(f"protocols.{name}.rules.{rule}: {error}") from None


@dataclass
class Progress:
    """How far a run is: jobs that are done of all that it has to do, and how long the rest will take.

    Time is foreseen from what jobs took in this run and earlier ones, in proportion to their work: a kind's own jobs,
    or all of them before the first of a kind is done. Before any is done nothing is said.
    """

    opened: Opened
    executor: Executor
    done: int = 0
    failed: int = 0
    total: int = 0
    _left: dict[str, float] = field(default_factory=dict)  # a job that is left → its work
    _took: dict[str, list[float]] = field(default_factory=dict)  # kind → work done, seconds it took

    def __post_init__(self) -> None:
        """Find what is left, and how long earlier runs took."""
        graph, store = self.opened.graph, self.opened.store
        works = work_of(graph, self.opened.study.recipe.model, self.opened.place.data)
        self._left = {job.key: works[job.key] for job in open_jobs(graph, store)}
        self.total = len(self._left)
        self._works, self._slots = dict(works), max(self.executor.workers, 1)
        for job in graph:
            record = store.record(job) if store.finished(job) else None
            if record is not None:
                self._learn(job.kind, works[job.key], record["timing"].get("seconds", 0.0))

    def hear(self, event: Mapping[str, Any]) -> None:
        """Take note of an event of a run."""
        key, self._slots = event["key"], event.get("workers", self._slots)
        if event["event"] == "begin" or self._left.pop(key, None) is None:
            return
        if event["event"] == "failed":
            self.failed += 1
            return
        self.done += 1
        if "seconds" in event:
            self._learn(self.opened.graph[key].kind, self._works[key], event["seconds"])

    def seconds_left(self) -> float | None:
        """Return how long the rest will take with all workers, None where nothing was done yet."""
        if not self._took:
            return None
        left = sum(work * self._rate(self.opened.graph[key].kind) for key, work in self._left.items())
        return left / self._slots

    def _learn(self, kind: str, work: float, seconds: float) -> None:
        known = self._took.setdefault(kind, [0.0, 0.0])
        known[0] += work
        known[1] += seconds

    def _rate(self, kind: str) -> float:
        taken = [self._took[kind]] if kind in self._took else list(self._took.values())
        return sum(seconds for _, seconds in taken) / sum(work for work, _ in taken)


def work_of(graph: Graph, model: str, data: Path | None) -> dict[str, float]:
    """Return, a job's key, how much there is to do, in passes of a token; jobs of a kind compare by it.

    A training step passes three times; a written token waits for memory, and a decomposition's operations for each
    other: they count as three of a pass.
    """
    shape = model_shape(model)
    a_pass = 2.0 * shape.parameters
    found = {}
    for job in graph:
        load = load_of(job, shape, data)
        slow = load.train_tokens + load.generated_tokens + load.svd_flops / a_pass
        found[job.key] = 1.0 + load.forward_tokens + 3 * slow
    return found


def status(opened: Opened) -> dict[str, Any]:
    """Return how far a study is, as JSON values: counts by kind, what is at work, what failed and why, time left."""
    graph, store = opened.graph, opened.store
    left = {job.key for job in open_jobs(graph, store)}
    failures = {
        job.name: told["error"]
        for job in graph
        if job.key in left and (told := store.failure(job)) is not None
    }
    kinds: dict[str, dict[str, int]] = {}
    for job in graph:
        counts = kinds.setdefault(job.kind, {"jobs": 0, "left": 0})
        counts["jobs"] += 1
        counts["left"] += job.key in left
    return {
        "study": opened.study.recipe.study,
        "jobs": len(graph),
        "left": len(left),
        "kinds": kinds,
        "at_work": [job.name for job in graph if job.key in left and store.at_work(job)],
        "failed": failures,
        "diverged": _diverged(graph, store),
        "missing_files": list(opened.study.missing),
        "core_seconds_left": Progress(opened, Executor()).seconds_left(),
    }


def _diverged(graph: Graph, store: Store) -> dict[str, str]:
    """The trainings that ended in numbers that are not finite, and where; they count as done."""
    reasons = {job.name: store.diverged(job) for job in graph if job.kind == "train"}
    return {name: why for name, why in reasons.items() if why is not None}
