"""What a study will cost before anything runs: jobs, tokens, operations, memory, disk, time; no weight is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hiplora.errors import ConfigError
from hiplora.models.shapes import ModelShape, model_shape
from hiplora.provenance import provenance
from hiplora.study.builder import Study
from hiplora.study.engine.jobs import Graph, Job
from hiplora.study.engine.todo import todo as find_todo
from hiplora.study.estimate import Cost, Machine, cost, full_settings
from hiplora.study.protocols.merge_fail import different_merges
from hiplora.study.steps.lengths import EDITS, ROWS, TASKS
from hiplora.study.steps.loads import known, load_of
from hiplora.study.steps.measured import edits_at, is_assumed, items_of

if TYPE_CHECKING:
    from hiplora.study.engine.store import Store

ASSUMED_SPREAD = (
    25.0  # pp: standard deviation of an item's difference between two methods, before any is measured
)


def job_costs(graph: Graph, model: str, machine: Machine, data: Path | None = None) -> dict[str, Cost]:
    """Return, a job's key, what it will cost on one device of a machine, with the study's files in the folder `data`.

    Raises:
        DataError: one of them cannot be used.
        ConfigError: the model's shape cannot be had, or a method does not fit it.
    """
    shape = model_shape(model)
    return {job.key: _cost(job, shape, machine, data) for job in graph}


def _cost(job: Job, shape: ModelShape, machine: Machine, data: Path | None) -> Cost:
    method = _method(job)
    trainable = 0 if method is None else shape.trainable(full_settings(known(method)))
    return cost(load_of(job, shape, data), shape, machine, trainable)


def _method(job: Job) -> Mapping[str, Any] | None:
    """The method that a job trains, if it trains one that recipes know."""
    method = job.settings.get("recipe", {}).get("method") if "recipe" in job.settings else None
    if job.kind == "edit" and job.settings["method"]["name"] != "alphaedit":
        method = job.settings["method"]
    return method


def plan(study: Study, graph: Graph, machines: Mapping[str, Machine], store: Store | None) -> dict[str, Any]:
    """Return what a study has to do and what that costs, as JSON values.

    `machines` are where it could run, by names to show. `store` tells what is done already; memory is that of the
    largest job, time that of one device after another job, divided among the devices.
    """
    todo = open_jobs(graph, store)
    shape = model_shape(study.recipe.model)
    found: dict[str, Any] = {
        "study": study.recipe.study,
        "model": study.recipe.model,
        "parameters": shape.parameters,
        "jobs": len(graph),
        "left": len(todo),
        "missing": list(study.missing),
        "assumed": _assumed(study, graph),
        "machines": {},
        "methods": methods_of(study),
        "power": _power(study),
        "merges": _merges(study),
        "provenance": provenance(),
    }
    for name, machine in machines.items():
        costs = job_costs(graph, study.recipe.model, machine, study.data)
        kinds = {kind: [job for job in todo if job.kind == kind] for kind in graph.counts()}
        found["machines"][name] = {
            "basis": machine.basis,
            "devices": machine.devices,
            "kinds": {kind: _sum(jobs, costs) for kind, jobs in kinds.items()},
            "total": _sum(todo, costs),
            "fits": all(costs[job.key].memory_bytes <= machine.memory_bytes for job in todo),
            "memory_available": machine.memory_bytes,
            "hours": sum(costs[job.key].seconds for job in todo) / machine.devices / 3600,
        }
    return found


def open_jobs(graph: Graph, store: Store | None) -> list[Job]:
    """Return the jobs that still have to be done: those that a missing result hangs on."""
    if store is None:
        return list(graph)
    left = find_todo(graph, store, run="")
    return [*left.ready, *left.waiting]


def _sum(jobs: list[Job], costs: Mapping[str, Cost]) -> dict[str, Any]:
    total = Cost()
    for job in jobs:
        total += costs[job.key]
    return {
        "jobs": len(jobs),
        "tokens": total.tokens,
        "flops": total.flops,
        "seconds": total.seconds,
        "hours": total.seconds / 3600,
        "memory_bytes": total.memory_bytes,
        "memory_gib": total.memory_bytes / 2**30,
        "disk_bytes": total.disk_bytes,
        "disk_gib": total.disk_bytes / 2**30,
    }


def methods_of(study: Study) -> dict[str, dict[str, Any]]:
    """Return every method's trainable parameters, with the mismatch to the first one in per cent.

    Raises:
        ConfigError: a method does not fit the model; it is named.
    """
    shape, found = model_shape(study.recipe.model), dict[str, dict[str, Any]]()
    for name, row in study.recipe.methods.items():
        try:
            count = shape.trainable(full_settings(row.method.model_dump()))
        except ConfigError as error:
            raise ConfigError(f"method {row.title}: {error}") from error
        first = next(iter(found.values()), {"trainable": count})["trainable"]
        found[name] = {"title": row.title, "trainable": count, "mismatch": 100 * (count / first - 1)}
    return found


def _assumed(study: Study, graph: Graph) -> list[str]:
    """Return the data and tasks that are neither here nor known: what they take is assumed."""
    data = [job.settings["recipe"]["data"] for job in graph if job.kind == "train"]
    names = [block.get("path") or block.get("hub") for block in data]
    edits = [job.settings["edits"] for job in graph if job.kind == "edit"]
    found = [name for name in names if is_assumed(name, ROWS, study.data)]
    found += [name for name in edits if is_assumed(name, EDITS, study.data)]
    found += [task for task in study.tasks if task not in TASKS]
    return list(dict.fromkeys(found))


def _power(study: Study) -> dict[str, dict[str, Any]]:
    """The smallest difference between two methods that a task's items can tell, under an assumed spread; of edits too.

    Of lm-eval's own tasks asked whole the number of items is not known, and there is none.
    """
    protocols, found = study.recipe.protocols, {}
    asked = [(task, task, items) for task, items in study.tasks.items()]
    if protocols.frontier is not None:
        asked += [(f"{task}, frontier", task, items) for task, items in protocols.frontier.tasks.items()]
    for name, task, wanted in asked:
        found[name] = _told(wanted or items_of(task, study.data))
    if protocols.editing is not None:
        for name, facts in protocols.editing.sets.items():
            found[f"edits of {name}"] = _told(
                edits_at(facts.edits, study.data, facts.limit, facts.category).rows
            )
        found["questions after edits"] = _told(protocols.editing.questions)
    return found


def _told(items: int | None) -> dict[str, Any]:
    least = None if not items else 1.96 * ASSUMED_SPREAD / math.sqrt(items)
    return {"items": items, "smallest_difference": least}


def _merges(study: Study) -> dict[str, Any] | None:
    """How many different merges are drawn for MergeFail, and what share may fail unseen if none of them does."""
    settings = study.recipe.protocols.merge_fail
    if settings is None:
        return None
    count = different_merges(study, settings).total()
    return {"different": count, "may_fail_unseen": 100 * (1 - 0.025 ** (1 / count))}
