"""A study's jobs in processes of this machine: workers that share the store, started again when one dies."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from typing import Any

from hiplora.errors import HipLoraError
from hiplora.study.engine.bench import Place
from hiplora.study.engine.jobs import Graph
from hiplora.study.engine.store import Store
from hiplora.study.engine.todo import Todo, todo

DEATHS = 2  # of workers: at one job, before it counts as failed; at none, with no job begun in between, before the end
OnEvent = Callable[[dict[str, Any]], None]


def run_local(
    graph: Graph, store: Store, place: Place, workers: int = 1, on_event: OnEvent | None = None
) -> Todo:
    """Do what is missing of a graph with `workers` processes, and return what is left: what failed, and behind it.

    It may be killed at any moment, and so may its workers: the next call goes on with what is missing. Two calls on
    one store share the work. A job that ends its worker twice (for lack of memory, most often) counts as failed.

    Args:
        graph: the jobs.
        store: where the results are.
        place: model and data.
        workers: number of processes.
        on_event: called with `{"event": "begin" | "end" | "failed", "key": KEY, …}`.
    """
    run = uuid.uuid4().hex
    if not (left := todo(graph, store, run)).open:
        return left
    crew = _Crew(store, place, run, graph, workers)
    deaths: dict[str | None, int] = {}
    try:
        for _ in range(workers):
            crew.start()
        while crew.running:
            event = crew.events.get()
            if event["event"] == "gone":
                crew.running -= 1
                _mourn(event, graph, store, run, deaths, crew)
                continue
            deaths.pop(None, None)
            if on_event is not None:
                on_event(event)
    finally:
        crew.end()
    return todo(graph, store, run)


def lost(deaths: int, status: str) -> HipLoraError:
    """Return what to say of a job that ended its worker again and again."""
    return HipLoraError(
        f"its process was ended {deaths} times ({status}), most often for lack of memory; give it more memory or fewer "
        "workers, and run the study again"
    )


def _mourn(
    event: dict[str, Any], graph: Graph, store: Store, run: str, deaths: dict[str | None, int], crew: "_Crew"
) -> None:
    """Take note that a worker ended; where it died, put another in its place."""
    if event["status"] == 0:
        return
    key, status = event["at"], f"status {event['status']}"
    deaths[key] = deaths.get(key, 0) + 1
    if deaths[key] >= DEATHS:
        if key is None:
            raise HipLoraError(
                f"{deaths[key]} workers ended ({status}) before they began a job; their own messages are above"
            )
        store.fail(graph[key], lost(deaths[key], status), run)
    crew.start()


def _environment(workers: int) -> dict[str, str]:
    """The environment of the workers: together they take no more threads than there are cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(cores // workers, 1)), **os.environ}


def _devices() -> list[str]:
    """The GPUs of this machine, by the names that CUDA takes, where there are several."""
    import torch

    count, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    named = visible.split(",")[:count] if visible else list(map(str, range(count)))
    return named if count > 1 else []


class _Crew:
    """The worker processes, and what they tell."""

    def __init__(self, store: Store, place: Place, run: str, graph: Graph, workers: int):
        self._environment, self._devices = _environment(workers), _devices()
        orders = {"store": str(store.path), "graph": graph.to_json(), "place": place.to_json(), "run": run}
        self._orders = json.dumps(orders).encode() + b"\n"
        self._members: list[subprocess.Popen] = []
        self._at: dict[int, str | None] = {}
        self.running = 0
        self.events: queue.Queue[dict[str, Any]] = queue.Queue()

    def start(self) -> None:
        environment, device = self._environment, self._free_device()
        if device is not None:
            environment = {**environment, "CUDA_VISIBLE_DEVICES": device}
        process = subprocess.Popen(
            [sys.executable, "-m", "hiplora.study.engine.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self._members.append(process)
        self._at[process.pid] = device
        self.running += 1
        threading.Thread(target=self._listen, args=(process,), daemon=True).start()

    def _free_device(self) -> str | None:
        """The GPU that the fewest living workers are at; None where there is no choice."""
        taken = [self._at[process.pid] for process in self._members if process.poll() is None]
        return min(self._devices, key=taken.count) if self._devices else None

    def _listen(self, process: subprocess.Popen) -> None:
        at = None
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once: its status says so
            process.stdin.write(self._orders)
            process.stdin.flush()
        for line in process.stdout:
            event = json.loads(line)
            at = event["key"] if event["event"] == "begin" else None
            self.events.put(event)
        status = process.wait()
        self.events.put({"event": "gone", "status": status, "at": at})

    def end(self) -> None:
        for process in self._members:
            process.terminate()  # the ended ones are left in peace
        for process in self._members:
            process.wait()
