"""Open a study in its folder, check it before it runs, and tell how far it is and how long the rest will take."""

import os
import time
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import ValidationError

from hiplora.errors import ConfigError, DataError, first_problem
from hiplora.evaluation.suite import own_tasks, runs_code
from hiplora.merging import find_rule
from hiplora.study.builder import Study
from hiplora.study.jobs import Job
from hiplora.study.pico import PICO, PICO_DATA
from hiplora.study.recipe import StudyRecipe
from hiplora.study.store import Place

ONE_BATCH = 8  # items that are scored to measure an item's time


def open_study(recipe: StudyRecipe, folder: str | Path, data: str | Path | None, allow_code: bool = False) -> Study:
    """Return a study with its jobs and its store in `folder`; nothing is written.

    `data` is by default what the model `pico` brings, for others $HIPLORA_DATA. DataError if there is no such folder;
    ConfigError if `folder` is a file, or the recipe's parts do not fit each other or the merge rules.
    """
    if Path(folder).is_file():
        raise ConfigError(f"--out {folder}: is a file; name the folder of the study's results")
    for name, settings in recipe.protocols:
        for rule, options in getattr(settings, "rules", {}).items():
            try:
                find_rule(rule).options(options)
            except ConfigError as error:
                raise ConfigError(f"protocols.{name}.rules.{rule}: {error}") from None
    if data is None:
        data = PICO_DATA if recipe.model == PICO else os.environ.get("HIPLORA_DATA") or None
    files = None if data is None else Path(data).resolve()
    if files is not None and not files.is_dir():
        raise DataError(f"--data {data}: no such folder; name the one with the study's files")
    # Absolute paths, for workers that run in another folder.
    model = str(Path(recipe.model).resolve()) if Path(recipe.model).is_dir() else recipe.model
    study = Study(recipe, Place(Path(folder).resolve(), model, files, allow_code))
    try:
        len(study.graph)
    except ValidationError as error:  # settings that are valid alone but not together
        raise ConfigError(f"study {recipe.study}: {first_problem(error)}") from None
    return study


def check(study: Study) -> None:
    """Check, before anything runs, that the files exist (DataError), and the tasks, or ConfigError.

    They must be known, and code that the model writes must be allowed if one runs it.
    """
    if study.missing:
        where = f" in {study.place.data}" if study.place.data else "; name their folder with --data"
        raise DataError(f"files of the study are missing{where}: {', '.join(study.missing)}")
    risky = sorted(task for task in check_tasks(study) if runs_code(task))
    if risky and not study.place.allow_code:
        raise ConfigError(
            f"tasks {', '.join(risky)} run code that the model writes; allow it with --allow-code-execution "
            "(docs/howto/code-execution.md), or remove them from the recipe"
        )


def check_tasks(study: Study) -> set[str]:
    """Return the tasks; raises ConfigError with those that are neither hiplora's nor lm-eval's."""
    tasks = {task for job in study.graph for task in job.settings.get("tasks") or ()}
    if foreign := tasks - own_tasks().keys():
        from hiplora.evaluation.engine import foreign_tasks

        if unknown := sorted(foreign - foreign_tasks()):
            raise ConfigError(
                f"unknown tasks: {', '.join(unknown)}; expected one of {', '.join(own_tasks())}, or one of lm-eval's "
                "(lm_eval ls tasks)"
            )
    return tasks


def status(study: Study, measured: dict[str, float] | None = None) -> dict[str, Any]:
    """Return how far a study is, as JSON values: counts by kind, running, failed and diverged jobs, time and memory.

    Times are those of one worker, from the jobs done in the study's folder and from what `measure` found.
    """
    store, measured = study.store, measured or {}
    left = store.unfinished(study.graph)
    timings = {job: (store.record(job) or {"timing": {}})["timing"] for job in study.graph}
    rows = [(job.kind, _size(job), job in left, timings[job].get("seconds")) for job in study.graph]
    jobs = pd.DataFrame(rows, columns=["kind", "size", "left", "seconds"])
    kinds = {kind: _remaining(rows, measured.get(kind)) for kind, rows in jobs.groupby("kind", sort=False)}
    estimates = [kind["seconds"] for kind in kinds.values() if kind["left"] and kind["seconds"] is not None]
    trained = [job for job in study.graph if job.kind == "train"]
    peaks = [timings[job].get("peak_memory_bytes") for job in trained]
    return {
        "study": study.recipe.study,
        "jobs": len(study.graph),
        "left": len(left),
        "kinds": kinds,
        "seconds_left": sum(estimates) if estimates or not left else None,
        "without_estimate": [name for name, kind in kinds.items() if kind["seconds"] is None],
        "peak_memory_bytes": max(filter(None, [*peaks, measured.get("peak_memory_bytes")]), default=None),
        "missing_files": list(study.missing),
        "at_work": [job.name for job in left if store.at_work(job)],
        "failed": {job.name: failure["error"] for job in left if (failure := store.failure(job))},
        "diverged": {job.name: reason for job in trained if (reason := store.diverged(job))},
    }


def _remaining(jobs: pd.DataFrame, rate: float | None) -> dict[str, Any]:
    """Count the jobs of a kind and estimate the seconds for those left, by steps or items; None if unknown."""
    size = jobs["size"]
    if not all(size):  # by jobs, then
        size, rate = size * 0 + 1, None
    done = ~jobs.left & jobs.seconds.notna()
    if done.any():
        rate = jobs.seconds[done].sum() / size[done].sum()
    left = int(jobs.left.sum())
    seconds = None if rate is None and left else float((rate or 0.0) * size[jobs.left].sum())
    return {"jobs": len(jobs), "left": left, "seconds": seconds}


def _size(job: Job) -> int:
    """Return a job's steps or items; 0 if they are not known before it runs."""
    if job.kind == "train":
        training = job.settings["recipe"].get("train", {})
        return 0 if "epochs" in training else training.get("steps", 2000)
    if job.kind in ("evaluate", "merge"):
        counts = job.settings["tasks"].values()
        return sum(counts) if all(counts) else 0
    return 1


def measure(study: Study) -> dict[str, float]:
    """Time one training step and one evaluation batch of a study on this machine; needs its model and data.

    Returns the seconds of a step under `train`, those of an item under `evaluate` and `merge`, and `peak_memory_bytes`.
    """
    from hiplora.study.steps import Context, placed_recipe, score, timed

    context, measured = Context(study.place), dict[str, float]()
    first = {job.kind: job.settings for job in reversed(list(study.graph))}
    if "train" in first:
        recipe = placed_recipe(context, first["train"]["recipe"])
        recipe["train"]["lr"] = 1e-4  # may still have to be chosen
        step = timed(recipe, warmup=1, steps=1)
        measured |= {"train": step["step_seconds_median"], "peak_memory_bytes": step["peak_memory_bytes"]}
    if "evaluate" in first:
        tasks = {task: min(n or ONE_BATCH, ONE_BATCH) for task, n in first["evaluate"]["tasks"].items()}
        settings = {**first["evaluate"], "tasks": tasks}
        model, _ = context.model()
        score(context, model, settings)  # imports lm-eval, and reads the tasks
        start = time.perf_counter()
        score(context, model, settings)
        measured["evaluate"] = measured["merge"] = (time.perf_counter() - start) / sum(tasks.values())
    return measured
