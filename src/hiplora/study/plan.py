"""A study at its folder: open it, check it before it runs, how far it is, and how long the rest will take."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hiplora.data.rows import read_rows
from hiplora.errors import ConfigError, DataError, first_problem
from hiplora.evaluation.suite import own_tasks, runs_code, task_settings
from hiplora.evaluation.tasks.rows import data_file
from hiplora.merging import find_rule
from hiplora.study.builder import Study
from hiplora.study.context import Context, Place
from hiplora.study.jobs import Graph, Job, is_result
from hiplora.study.pico import PICO, write_pico_data
from hiplora.study.protocols import all_jobs
from hiplora.study.recipe import StudyRecipe
from hiplora.study.store import Store, todo

ONE_BATCH = 8  # items that are scored to measure an item's time


@dataclass(frozen=True)
class Opened:
    """A study at its folder: the recipe's jobs, the store, and where its jobs find model and data."""

    study: Study
    graph: Graph
    store: Store
    place: Place


def open_study(
    recipe: StudyRecipe, folder: str | Path, data: str | Path | None, allow_code: bool = False
) -> Opened:
    """Return a study's jobs and its store in `folder`; only the data of the model `pico` are written.

    Raises:
        DataError: there is no such data folder.
        ConfigError: `folder` is a file, or the recipe's parts do not fit each other or the merge rules.
    """
    if Path(folder).is_file():
        raise ConfigError(f"--out {folder}: is a file; name the folder of the study's results")
    for name, settings in recipe.protocols:
        for rule, options in getattr(settings, "rules", {}).items():
            try:
                find_rule(rule).options(options)
            except ConfigError as error:
                raise ConfigError(f"protocols.{name}.rules.{rule}: {error}") from None
    place = Path(data) if data is not None else None
    if place is None and recipe.model == PICO:
        place = Path(folder) / "data"
        write_pico_data(place)
    if place is not None and not place.is_dir():
        raise DataError(f"--data {place}: no such folder; name the one with the study's files")
    study = Study(recipe, place)
    try:
        graph = Graph(all_jobs(study))
    except ValidationError as error:  # settings that are valid alone but not together
        raise ConfigError(f"study {recipe.study}: {first_problem(error)}") from None
    return Opened(study, graph, Store(folder), Place(recipe.model, place, allow_code))


def check(opened: Opened) -> None:
    """Check, before anything runs, that the files exist, the tasks are known, and code may run if a task needs it.

    Raises:
        DataError: files are missing.
        ConfigError: tasks are unknown, or run code that the model writes, and that was not allowed.
    """
    if missing := list(opened.study.missing):
        where = f" in {opened.place.data}" if opened.place.data else "; name their folder with --data"
        raise DataError(f"files of the study are missing{where}: {', '.join(missing)}")
    check_tasks(opened.graph)
    risky = sorted(task for task in _tasks(opened.graph) if runs_code(task))
    if risky and not opened.place.allow_code:
        raise ConfigError(
            f"tasks {', '.join(risky)} run code that the model writes; allow it with --allow-code-execution "
            "(docs/howto/code-execution.md), or remove them from the recipe"
        )


def check_tasks(graph: Graph) -> None:
    """Check that every task is hiplora's or lm-eval's; raises ConfigError with the unknown ones."""
    foreign = _tasks(graph) - set(own_tasks())
    if not foreign:
        return
    from hiplora.evaluation.engine import foreign_tasks

    if unknown := sorted(foreign - foreign_tasks()):
        raise ConfigError(
            f"unknown tasks: {', '.join(unknown)}; expected one of {', '.join(own_tasks())}, or one of lm-eval's "
            "(lm_eval ls tasks)"
        )


def _tasks(graph: Graph) -> set[str]:
    return {task for job in graph for task in job.settings.get("tasks") or ()}


def status(opened: Opened) -> dict[str, Any]:
    """Return how far a study is, as JSON values: counts by kind, running, failed and diverged jobs, time left."""
    graph, store = opened.graph, opened.store
    left = set(todo(graph, store).open)
    failures = {job.name: store.failure(job) for job in left}
    diverged = {job.name: store.diverged(job) for job in graph if job.kind == "train"}
    return {
        **_remaining(opened, left, {}),
        "at_work": [job.name for job in graph if job in left and store.at_work(job)],
        "failed": {name: failure["error"] for name, failure in failures.items() if failure},
        "diverged": {name: reason for name, reason in diverged.items() if reason},
    }


def plan(opened: Opened, measure: bool = False) -> dict[str, Any]:
    """Return what a study has to do, as JSON values: jobs by kind, and the time and memory of what is left.

    Times come from the jobs done in the study's folder and, with `measure`, from one training step and one evaluation
    batch on this machine; those of other kinds are unknown until one is done.
    """
    check_tasks(opened.graph)
    measured = measure_machine(opened) if measure else {}
    peaks = [
        (opened.store.record(job) or {"timing": {}})["timing"].get("peak_memory_bytes")
        for job in opened.graph
        if job.kind == "train"
    ]
    return {
        **_remaining(opened, set(todo(opened.graph, opened.store).open), measured),
        "model": opened.study.recipe.model,
        "measured": measured,
        "peak_memory_bytes": max(filter(None, [*peaks, measured.get("peak_memory_bytes")]), default=None),
    }


def _remaining(opened: Opened, left: set[Job], measured: dict[str, float]) -> dict[str, Any]:
    """Count jobs by kind and estimate the seconds that one worker needs for those left; None where unknown."""
    rates = {"train": measured.get("step_seconds")}
    rates |= dict.fromkeys(("evaluate", "merge"), measured.get("item_seconds"))
    kinds: dict[str, dict[str, Any]] = {}
    for kind, count in opened.graph.counts().items():
        jobs = [job for job in opened.graph if job.kind == kind]
        units = {job: _units(job, opened.study) for job in jobs}
        counted = all(units.values())
        done = [job for job in jobs if job not in left and opened.store.finished(job)]
        took = sum((opened.store.record(job) or {"timing": {}})["timing"].get("seconds", 0.0) for job in done)
        size = {job: units[job] if counted else 1 for job in jobs}
        rate = took / sum(size[job] for job in done) if done else rates.get(kind) if counted else None
        open_jobs = [job for job in jobs if job in left]
        seconds = None if rate is None else rate * sum(size[job] for job in open_jobs)
        kinds[kind] = {"jobs": count, "left": len(open_jobs), "seconds": seconds if open_jobs else 0.0}
    known = [one["seconds"] for one in kinds.values() if one["left"] and one["seconds"] is not None]
    return {
        "study": opened.study.recipe.study,
        "jobs": len(opened.graph),
        "left": len(left),
        "kinds": kinds,
        "seconds_left": sum(known) if known or not left else None,
        "without_estimate": [kind for kind, one in kinds.items() if one["seconds"] is None],
        "missing_files": list(opened.study.missing),
    }


def _units(job: Job, study: Study) -> int:
    """Return the size of a job: its steps or items; 0 if that is not known before it runs."""
    if job.kind == "train":
        trained = job.settings["recipe"].get("train", {})
        return 0 if "epochs" in trained else trained.get("steps", 2000)
    if job.kind in ("evaluate", "merge"):
        counts = [items or _rows(task, study.data) for task, items in job.settings["tasks"].items()]
        return sum(counts) if all(counts) else 0
    return 1


def _rows(task: str, data: Path | None) -> int:
    try:
        path = data_file(data, task_settings(task)["file"]) if data is not None else None
    except FileNotFoundError:  # one of lm-eval's own
        return 0
    return 0 if path is None else sum(1 for _ in read_rows(path))


def measure_machine(opened: Opened) -> dict[str, float]:
    """Time one training step and one evaluation batch of a study on this machine; needs its model and data."""
    from hiplora.study.steps.measure import score
    from hiplora.study.steps.train import placed_recipe, timed

    context, found = Context(opened.store, opened.place), dict[str, float]()
    trained = next((job for job in opened.graph if job.kind == "train"), None)
    if trained is not None:
        recipe = placed_recipe(context, trained.settings["recipe"])
        if is_result(recipe["train"]["lr"]):
            recipe["train"]["lr"] = 1e-4
        took = timed(recipe, warmup=1, steps=1)
        found["step_seconds"] = took["step_seconds_median"]
        found["peak_memory_bytes"] = took["peak_memory_bytes"]
    scored = next((job for job in opened.graph if job.kind == "evaluate"), None)
    if scored is not None:
        tasks = {task: min(n or ONE_BATCH, ONE_BATCH) for task, n in scored.settings["tasks"].items()}
        model, _ = context.model()
        began = time.perf_counter()
        score(context, model, {**scored.settings, "tasks": tasks})
        found["item_seconds"] = (time.perf_counter() - began) / sum(tasks.values())
    return found
