"""A worker: claims the next job that can be done, does it, and so on until nothing is left.

Run as `python -m hiplora.study.engine.worker`, with one line of JSON on standard input, which stays open for as long
as the caller lives; tells what it does on standard output, a line of JSON an event.
"""

import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

from hiplora.errors import HipLoraError
from hiplora.study.engine.bench import Bench, Place
from hiplora.study.engine.jobs import DIVERGED, Graph, Job
from hiplora.study.engine.store import Store
from hiplora.study.engine.todo import done, todo
from hiplora.study.isolated import leave_with_caller
from hiplora.study.steps.registry import step

PAUSE = 0.3  # seconds between two looks for a job that became ready
Tell = Callable[[dict[str, Any]], None]


def work(graph: Graph, store: Store, bench: Bench, run: str, tell: Tell) -> None:
    """Do jobs of a graph, one at a time, until none is left that this run can do.

    Other workers, of this run or another, may be at the same graph: whoever holds a job's lock does it. What fails is
    written down under the name of the run, and what hangs on it is left alone.
    """
    while (left := todo(graph, store, run)).open:
        if not any(attempt(job, store, bench, run, tell) for job in left.ready):
            time.sleep(PAUSE)  # all that is ready is in other hands, or waits for what is


def attempt(job: Job, store: Store, bench: Bench, run: str, tell: Tell) -> bool:
    """Do a job whose needs are finished, if nobody else is at it; return whether it is over."""
    with store.claimed(job) as mine:
        if not mine:
            return False
        if done(job, store, for_artifact=True):  # somebody did it since we looked
            return True
        tell({"event": "begin", "key": job.key})
        began = time.perf_counter()
        try:
            with store.turn(step(job.kind).alone):
                do(job, store, bench)
        except Exception as error:  # whatever it is, the other jobs go on
            store.fail(job, error, run)
            bench.reset()
            tell({"event": "failed", "key": job.key})
        else:
            tell({"event": "end", "key": job.key, "seconds": time.perf_counter() - began})
        return True


def do(job: Job, store: Store, bench: Bench) -> None:
    """Do a job and write its record; what it needs is finished."""
    began = time.perf_counter()
    results = {name: bench.result(need) for name, need in job.needs.items()}
    lost = [found[DIVERGED] for found in results.values() if DIVERGED in found]
    if lost and step(job.kind).reads:  # there is no adapter to work with
        found, timing = {DIVERGED: lost[0]}, dict[str, Any]()
    else:
        found, timing = step(job.kind).work(bench, job, job.resolved(results))
    if DIVERGED in found and store.finished(job) and store.diverged(job) is None:
        raise HipLoraError(
            f"{found[DIVERGED]}; the record that was taken over has a finite result, of another machine: go on there, "
            "or begin in a new folder without --reuse"
        )
    timing = {"seconds": time.perf_counter() - began, **timing}
    store.finish(job, found, timing, artifact=step(job.kind).makes)


def main() -> int:
    """Work as the line on standard input says."""
    given = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=leave_with_caller, daemon=True).start()
    store = Store(given["store"])
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the libraries print goes to standard error
    graph = Graph.from_json(given["graph"])
    bench = Bench(store, Place.from_json(given["place"]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # the libraries' advice to each other
        try:
            work(graph, store, bench, given["run"], lambda event: print(json.dumps(event), file=events))
        except BrokenPipeError:  # who called is gone
            pass
        except OSError as error:  # not even a failure can be written down: a full disk
            print(f"error: the study's folder cannot be written: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
