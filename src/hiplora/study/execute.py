"""Run a study's jobs: in processes of this machine, or as tasks of a Ray cluster; both do one job by `run_job`."""

import contextlib
import functools
import multiprocessing
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

from hiplora.errors import ConfigError, HipLoraError, first_line
from hiplora.extras import require
from hiplora.study.jobs import DIVERGED, KINDS, Graph, Job, filled
from hiplora.study.store import Place, Store

if TYPE_CHECKING:  # imports torch, whose threads a worker sets first
    from hiplora.study.steps import Context

PAUSE = 0.3  # seconds between two looks at jobs that other runs hold
LOST = (
    "its process died twice ({}), usually for lack of memory; use fewer --workers or a machine with more memory, and "
    "run the study again"
)
OnEvent = Callable[[str, Job], None]  # "begin", "done" or "failed"


def run_graph(
    graph: Graph,
    place: Place,
    workers: int = 1,
    executor: str = "local",
    address: str | None = None,
    gpus_per_job: float = 0.0,
    on_event: OnEvent = lambda event, job: None,
) -> set[Job]:
    """Do what is missing of a graph and return the jobs that failed, which stop no others.

    The call may be killed at any moment; the next one continues. Several calls on one folder share the work. A job that
    ends its process twice counts as failed. `executor` is `local`, with `workers` processes, or `ray`: the cluster at
    `address`, None starts one here; ConfigError if there is none.
    """
    store, failed, died = Store(place.folder), set[Job](), set[Job]()
    running: dict[Future[str], tuple[int, Job]] = {}  # with the slot of each job
    if not store.unfinished(graph):
        return failed
    pool = _Ray(place, workers, address, gpus_per_job) if executor == "ray" else _Processes(place, workers)
    try:
        while True:
            taken = dict(running.values())
            excluded = {*failed, *taken.values()}
            ready = [job for job, can_start in store.unfinished(graph).items() if can_start and job not in excluded]
            if not ready and not running:
                return failed
            free = [slot for slot in range(pool.slots) if slot not in taken]
            for slot, job in zip(free, (job for job in ready if not store.at_work(job)), strict=False):
                running[pool.submit(slot, job)] = slot, job
                on_event("begin", job)
            if not running:
                time.sleep(PAUSE)  # other runs hold every job that is ready
            pause = PAUSE if len(running) < pool.slots else None
            for future in wait(running, timeout=pause, return_when=FIRST_COMPLETED).done:
                _, job = running.pop(future)
                try:
                    outcome = future.result()
                except pool.died as error:
                    outcome = "failed" if job in died else "busy"
                    died.add(job)
                    if outcome == "failed":
                        store.fail(job, HipLoraError(LOST.format(type(error).__name__)))
                if outcome == "failed":
                    failed.add(job)
                if outcome != "busy":
                    on_event(outcome, job)
    finally:
        pool.close(interrupted=bool(running))


def run_job(job: Job, context: "Context") -> str:
    """Do one job whose needs are finished; return "done", "failed" (the reason is stored), or "busy" elsewhere."""
    store = context.store
    with store.claimed(job) as claimed:
        if not claimed:
            return "busy"
        try:
            if not store.readable(job):
                with store.slot(exclusive=KINDS[job.kind].alone):
                    _do(job, context)
        except Exception as error:
            store.fail(job, error)
            context.reset()
            return "failed"
    return "done"


def _do(job: Job, context: "Context") -> None:
    from hiplora.study.steps import STEPS

    start, store, kind = time.perf_counter(), context.store, KINDS[job.kind]
    needed = {name: store.result(need) or {} for name, need in job.needs.items()}
    reasons = [result[DIVERGED] for result in needed.values() if DIVERGED in result]
    if reasons and kind.reads:  # there is no adapter to work with
        result, timing = {DIVERGED: reasons[0]}, dict[str, Any]()
    else:
        result, timing = STEPS[job.kind](context, job, filled(job.settings, needed))
    if DIVERGED in result and store.finished(job) and store.diverged(job) is None:
        raise HipLoraError(
            f"{result[DIVERGED]}; the reused record, of another machine, has a finite result: continue there, or start "
            "in a new folder without --reuse"
        )
    store.finish(job, result, {"seconds": time.perf_counter() - start, **timing}, artifact=kind.makes)


@functools.lru_cache(maxsize=1)
def _context(place: Place) -> "Context":
    """What a worker keeps between jobs."""
    from hiplora.study.steps import Context

    return Context(place)


def _work(job: Job, place: Place) -> str:
    return run_job(job, _context(place))


class _Processes:
    """Worker processes of this machine. Each has a pool of its own, so that one that dies takes one job with it."""

    died = BrokenProcessPool

    def __init__(self, place: Place, workers: int):
        self.slots, self._place = workers, place
        self._earlier = set(multiprocessing.active_children())  # not of this study
        self._pools: dict[int, ProcessPoolExecutor] = {}

    def submit(self, slot: int, job: Job) -> "Future[str]":
        with contextlib.suppress(KeyError, BrokenProcessPool):
            return self._pools[slot].submit(_work, job, self._place)
        spawn = multiprocessing.get_context("spawn")
        self._pools[slot] = ProcessPoolExecutor(1, spawn, _start_worker, (slot, self.slots))
        return self._pools[slot].submit(_work, job, self._place)

    def close(self, interrupted: bool) -> None:
        for process in set(multiprocessing.active_children()) - self._earlier if interrupted else ():
            process.terminate()  # files are whole or absent, so an interrupted job loses nothing it stored
        for pool in self._pools.values():
            pool.shutdown(cancel_futures=True)


def start_child() -> None:
    """Prepare a process that was started for jobs: quiet, and ended when its parent ends, however that ended."""

    def exit_with_parent() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    os.environ["TQDM_DISABLE"] = "1"  # the study has one bar
    os.dup2(2, 1)  # libraries print to standard error, which leaves standard output to --json
    threading.Thread(target=exit_with_parent, daemon=True).start()


def _start_worker(slot: int, workers: int) -> None:
    start_child()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(cores // workers, 1)))  # before torch is imported
    warnings.filterwarnings("ignore", category=FutureWarning)
    import torch

    if (count := torch.cuda.device_count()) > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else list(map(str, range(count)))
        os.environ["CUDA_VISIBLE_DEVICES"] = names[slot % count]


class _Ray:
    """A Ray cluster. The store, the data and the model must have the same paths on all of its machines."""

    def __init__(self, place: Place, workers: int, address: str | None, gpus_per_job: float):
        require("ray")
        import ray

        _connect(ray, workers, address)
        largest = max((node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
        if gpus_per_job > largest:
            raise ConfigError(
                f"--gpus-per-job {gpus_per_job:g}: no machine of the cluster has more than {largest:g}; lower it"
            )
        self.slots = max(int(ray.cluster_resources().get("CPU", 1.0)), 1)  # what finds no GPU waits in Ray's own queue
        self._ray, self._place, self.died = ray, place, ray.exceptions.RayError
        self._task = ray.remote(num_cpus=1, num_gpus=gpus_per_job, max_retries=0)(_work)

    def submit(self, slot: int, job: Job) -> "Future[str]":
        return self._task.remote(job, self._place).future()

    def close(self, interrupted: bool) -> None:
        self._ray.shutdown()


def _connect(ray: Any, workers: int, address: str | None) -> None:
    resources = {} if address else {"num_cpus": workers, "include_dashboard": False}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machine
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 starves jobs beside anything else
    try:
        host, _, port = (address or "").rpartition(":")
        if host and "/" not in host and port.isdigit():  # Ray itself would wait for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **resources)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"--address {address}: no Ray cluster answers ({first_line(error)}); start one with `ray start --head`, or "
            "leave out --address"
        ) from error
