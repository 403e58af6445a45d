"""A study's jobs on a Ray cluster: each is one task, which waits for those that it needs; Ray does the scheduling."""

import functools
import importlib.util
import json
import math
import os
import socket
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hiplora.errors import ConfigError, first_line
from hiplora.study.engine.bench import Bench, Place
from hiplora.study.engine.jobs import Graph
from hiplora.study.engine.local import DEATHS, OnEvent, lost
from hiplora.study.engine.store import Store
from hiplora.study.engine.todo import Todo, todo
from hiplora.study.engine.worker import PAUSE, attempt

BLOCKED, OVER = "blocked", "over"
Done = tuple[str, float | None]  # what became of a job, and the seconds it took this task


def run_ray(
    graph: Graph,
    store: Store,
    place: Place,
    address: str | None = None,
    *,
    workers: int | None = None,
    gpus_per_job: float = 0,
    on_event: OnEvent | None = None,
) -> Todo:
    """Do what is missing of a graph on a Ray cluster, and return what is left: what failed, and behind it.

    The folder of the store, the data and the model must be where all machines of the cluster see them under the same
    path. A job whose process dies is given to another once; then it counts as failed.

    Args:
        graph: the jobs.
        store: where the results are.
        place: model and data.
        address: of a running cluster; None starts one on this machine, and ends it.
        workers: processes of a cluster that is started here; None is one a core.
        gpus_per_job: what each job asks Ray for.
        on_event: called with `{"event": "end" | "failed", "key": KEY, "workers": N}`, N jobs run at once; with the
            `seconds` that the job took, where it ended.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster at the address.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("--executor ray needs Ray, which is not installed: pip install 'hiplora[grid]'")
    import ray

    run = uuid.uuid4().hex
    left = todo(graph, store, run)
    if not left.open:
        return left
    _connect(ray, address, workers)
    try:
        _check_gpus(ray, gpus_per_job)
        task = ray.remote(num_cpus=1, num_gpus=gpus_per_job, max_retries=DEATHS - 1)(_do_job)
        known = ray.put(graph.to_json())
        wanted = {job.key for job in (*left.ready, *left.waiting)}
        orders = (str(store.path.resolve()), place.absolute().to_json(), run)
        refs: dict[str, Any] = {}
        for job in graph:
            if job.key in wanted:
                needs = [refs[need.key] for need in job.needs.values() if need.key in wanted]
                refs[job.key] = task.remote(known, job.key, *orders, *needs)
        _await(ray, refs, graph, store, run, _telling(on_event, _slots(ray, gpus_per_job)))
    finally:
        ray.shutdown()
    return todo(graph, store, run)


def _connect(ray: Any, address: str | None, workers: int | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing goes over the network
    if address is not None:
        _check_reachable(address)
    here: dict[str, Any] = {}
    if address is None:
        here = {"num_cpus": workers, "include_dashboard": False}
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 starves jobs beside anything else
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **here)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _unreachable(address, first_line(error)) from error


def _check_reachable(address: str) -> None:
    """Ray itself would wait for minutes; `auto` and addresses of other schemes are left to it."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise _unreachable(address, error.strerror or str(error)) from error


def _unreachable(address: str | None, why: str) -> ConfigError:
    return ConfigError(
        f"--address {address}: no Ray cluster can be reached there ({why}); start one with `ray start --head`, or "
        "leave the address out"
    )


def _check_gpus(ray: Any, gpus_per_job: float) -> None:
    most = max((node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
    if gpus_per_job > most:
        raise ConfigError(
            f"--gpus-per-job {gpus_per_job:g}: no machine of the cluster has more than {most:g}, and the jobs would "
            "wait for ever; lower it"
        )


def _slots(ray: Any, gpus_per_job: float) -> int:
    """How many jobs the cluster does at the same time."""
    there = ray.cluster_resources()
    of_gpus = there.get("GPU", 0.0) / gpus_per_job if gpus_per_job else math.inf
    return max(int(min(there.get("CPU", 1.0), of_gpus)), 1)


def _telling(on_event: OnEvent | None, slots: int) -> OnEvent:
    def tell(event: dict[str, Any]) -> None:
        if on_event is not None:
            on_event({**event, "workers": slots})

    return tell


def _await(
    ray: Any, refs: Mapping[str, Any], graph: Graph, store: Store, run: str, on_event: OnEvent
) -> None:
    """Wait for all tasks; where one was lost with its process, write that down for its job.

    Of a job that was not done, since one that it needs failed, nothing is told.
    """
    keys = {ref: key for key, ref in refs.items()}
    while keys:
        for ref in ray.wait(list(keys), num_returns=1)[0]:
            key, took = keys.pop(ref), None
            try:
                state, took = ray.get(ref)
                over = state == OVER
            except ray.exceptions.RayError as error:
                over = False
                if any(need.key in refs and _lost(ray, refs[need.key]) for need in graph[key].needs.values()):
                    continue  # Ray hands the loss of a task on to those that wait for it
                if isinstance(error, ray.exceptions.RayTaskError):
                    raise  # the task's own code failed, not its job
                store.fail(graph[key], lost(DEATHS, type(error).__name__), run)
            if over or store.failure(graph[key], run):
                told = {"event": "end" if over else "failed", "key": key}
                on_event(told if took is None else {**told, "seconds": took})


def _lost(ray: Any, ref: Any) -> bool:
    """Whether a task, which is over, was lost with its process or waited for one that was."""
    try:
        ray.get(ref)
    except ray.exceptions.RayError:
        return True
    return False


def _do_job(
    known: Mapping[str, Any], key: str, store: str, place: Mapping[str, Any], run: str, *needs: Done
) -> Done:
    """Do a job as a Ray task; `needs` are there only to be waited for."""
    if any(state == BLOCKED for state, _ in needs):
        return BLOCKED, None
    bench, job = _bench(store, json.dumps(place)), Graph.from_json(known)[key]
    events: list[dict[str, Any]] = []
    while not attempt(job, bench.store, bench, run, events.append):
        time.sleep(PAUSE)  # another run is at it
    took = next((event["seconds"] for event in events if event["event"] == "end"), None)
    return BLOCKED if bench.store.failure(job, run) else OVER, took


@functools.cache
def _bench(store: str, place: str) -> Bench:
    """The bench of this process, kept for its next task."""
    return Bench(Store(Path(store)), Place.from_json(json.loads(place)))
