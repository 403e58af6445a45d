"""Run a study's jobs: in processes of this machine, or as tasks of a Ray cluster; both do one job by `run_job`."""

import importlib.util
import math
import multiprocessing
import os
import signal
import socket
import threading
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hiplora.errors import ConfigError, HipLoraError, first_line
from hiplora.study.context import Context, Place
from hiplora.study.jobs import DIVERGED, Graph, Job
from hiplora.study.steps import step
from hiplora.study.store import Store, Todo, done, todo

DEATHS = 2  # a job that ends its process so often has failed
PAUSE = 0.3  # seconds between two looks at jobs that other runs hold
OnEvent = Callable[[str, Job], None]  # "begin", "done" or "failed"


@dataclass(frozen=True)
class Executor:
    """Where jobs run: `local` in `workers` processes, or on a `ray` cluster at `address` (None starts one here)."""

    name: str = "local"
    workers: int = 1
    address: str | None = None
    gpus_per_job: float = 0.0


class _Workers(Protocol):
    slots: int  # jobs that run at the same time
    died: type[Exception]  # what a future raises when its process died

    def submit(self, job: Job) -> "Future[str]": ...
    def close(self) -> None: ...


def run_graph(
    graph: Graph,
    store: Store,
    place: Place,
    executor: Executor | None = None,
    on_event: OnEvent = lambda event, job: None,
) -> Todo:
    """Do what is missing of a graph and return what is left: failed jobs and those behind them.

    The call may be killed at any moment; the next one continues. Several calls on one store share the work. A failed
    job does not stop the others. A job that ends its process twice (usually for lack of memory) counts as failed.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster at the address.
        OSError: the store cannot be written.
    """
    run, executor, deaths = uuid.uuid4().hex, executor or Executor(), Counter[Job]()
    left, running = todo(graph, store, run), dict["Future[str]", Job]()
    if not left.open:
        return left
    workers = (_Ray if executor.name == "ray" else _Processes)(store, place, run, executor)
    try:
        while left.open or running:
            free = workers.slots - len(running)
            for job in _startable(left, store, set(running.values()))[:free]:
                running[workers.submit(job)] = job
                on_event("begin", job)
            if not running:
                time.sleep(PAUSE)  # other runs hold every job that is ready
            pause = PAUSE if len(running) < workers.slots else None
            for future in wait(running, timeout=pause, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                try:
                    outcome = future.result()
                except workers.died as error:
                    deaths[job] += 1
                    outcome = "busy" if deaths[job] < DEATHS else "failed"
                    if outcome == "failed":
                        store.fail(job, _lost(error), run)
                if outcome != "busy":
                    on_event(outcome, job)
            left = todo(graph, store, run)
        return left
    finally:
        workers.close()


def _startable(left: Todo, store: Store, running: set[Job]) -> list[Job]:
    return [job for job in left.ready if job not in running and not store.at_work(job)]


def _lost(error: Exception) -> HipLoraError:
    return HipLoraError(
        f"its process died {DEATHS} times ({type(error).__name__}), usually for lack of memory; use fewer --workers or "
        "a machine with more memory, and run the study again"
    )


def run_job(job: Job, context: Context, run: str) -> str:
    """Do one job whose needs are finished; return "done", "failed", or "busy" if another process is doing it.

    A failure is stored under the name of the run.
    """
    store = context.store
    with store.claimed(job) as mine:
        if not mine:
            return "busy"
        if done(job, store, for_artifact=True):
            return "done"
        try:
            with store.slot(exclusive=step(job.kind).alone):
                _do(job, context)
        except Exception as error:
            store.fail(job, error, run)
            context.reset()
            return "failed"
    return "done"


def _do(job: Job, context: Context) -> None:
    began, store = time.perf_counter(), context.store
    results = {name: context.result(need) for name, need in job.needs.items()}
    lost = [found[DIVERGED] for found in results.values() if DIVERGED in found]
    if lost and step(job.kind).reads:  # there is no adapter to work with
        found, timing = {DIVERGED: lost[0]}, dict[str, Any]()
    else:
        found, timing = step(job.kind).work(context, job, job.resolved(results))
    if DIVERGED in found and store.finished(job) and store.diverged(job) is None:
        raise HipLoraError(
            f"{found[DIVERGED]}; the reused record, of another machine, has a finite result: continue there, or start "
            "in a new folder without --reuse"
        )
    timing = {"seconds": time.perf_counter() - began, **timing}
    store.finish(job, found, timing, artifact=step(job.kind).makes)


class _Processes:
    """Worker processes of this machine. Each has a pool of its own, so that one that dies takes one job with it."""

    died = BrokenProcessPool

    def __init__(self, store: Store, place: Place, run: str, executor: Executor):
        self.slots = executor.workers
        self._arguments = (Context(store, place), run, executor.workers)
        self._others = set(multiprocessing.active_children())
        self._pools: list[ProcessPoolExecutor | None] = [None] * self.slots
        self._futures: list[Future[str] | None] = [None] * self.slots

    def submit(self, job: Job) -> "Future[str]":
        slot = next(i for i, future in enumerate(self._futures) if future is None or future.done())
        last, pool = self._futures[slot], self._pools[slot]
        if pool is None or (last is not None and isinstance(last.exception(), BrokenProcessPool)):
            spawn = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(1, spawn, _start_worker, (slot, *self._arguments))
        future = pool.submit(_work, job)
        self._pools[slot], self._futures[slot] = pool, future
        return future

    def close(self) -> None:
        for process in set(multiprocessing.active_children()) - self._others:
            process.terminate()  # files are whole or absent, so an interrupted job loses nothing it stored
        for pool in self._pools:
            if pool is not None:
                pool.shutdown(cancel_futures=True)


_worker: tuple[Context, str] | None = None  # of this process, if it is a worker


def _start_worker(slot: int, context: Context, run: str, workers: int) -> None:
    """Prepare a worker process: its threads and GPU, what it prints, and how it ends."""
    global _worker
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(cores // workers, 1)))  # before torch is imported
    os.environ["TQDM_DISABLE"] = "1"  # the study has one bar
    os.dup2(2, 1)  # libraries print to standard error, which leaves standard output to --json
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    threading.Thread(target=exit_with_parent, daemon=True).start()
    warnings.filterwarnings("ignore", category=FutureWarning)
    import torch

    if (count := torch.cuda.device_count()) > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else list(map(str, range(count)))
        os.environ["CUDA_VISIBLE_DEVICES"] = names[slot % count]
    _worker = context, run


def exit_with_parent() -> None:
    """End this process when the one that started it ends, however that ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(job: Job) -> str:
    assert _worker is not None
    context, run = _worker
    return run_job(job, context, run)


class _Ray:
    """A Ray cluster. The store, the data and the model must have the same paths on all of its machines."""

    def __init__(self, store: Store, place: Place, run: str, executor: Executor):
        if importlib.util.find_spec("ray") is None:
            raise ConfigError("--executor ray needs Ray, which is not installed: pip install 'hiplora[ray]'")
        import ray

        self.died, self._ray = ray.exceptions.RayError, ray
        _connect(ray, executor)
        self.slots = _cluster_slots(ray, executor.gpus_per_job)
        task = ray.remote(num_cpus=1, num_gpus=executor.gpus_per_job, max_retries=0)(_ray_task)
        self._call = lambda job: task.remote(job, str(store.path.resolve()), place.absolute(), run)

    def submit(self, job: Job) -> "Future[str]":
        return self._call(job).future()

    def close(self) -> None:
        self._ray.shutdown()


def _ray_task(job: Job, store: str, place: Place, run: str) -> str:
    global _worker
    if _worker is None or (str(_worker[0].store.path), _worker[0].place) != (store, place):
        _worker = Context(Store(Path(store)), place), run
    return run_job(job, _worker[0], run)


def _connect(ray: Any, executor: Executor) -> None:
    address, here = executor.address, dict[str, Any]()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machine
    if address is None:
        here = {"num_cpus": executor.workers, "include_dashboard": False}
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 starves jobs beside anything else
    try:
        host, _, port = (address or "").rpartition(":")
        if host and "/" not in host and port.isdigit():  # Ray itself would wait for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **here)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"--address {address}: no Ray cluster answers ({first_line(error)}); start one with `ray start --head`, or "
            "leave out --address"
        ) from error


def _cluster_slots(ray: Any, gpus_per_job: float) -> int:
    """Return how many jobs the cluster runs at the same time."""
    most = max((node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
    if gpus_per_job > most:
        raise ConfigError(
            f"--gpus-per-job {gpus_per_job:g}: no machine of the cluster has more than {most:g}; lower it"
        )
    resources = ray.cluster_resources()
    by_gpus = resources.get("GPU", 0.0) / gpus_per_job if gpus_per_job else math.inf
    return max(int(min(resources.get("CPU", 1.0), by_gpus)), 1)
