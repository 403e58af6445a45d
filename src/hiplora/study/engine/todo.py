"""What is left to do of a graph, given what the store has."""

from dataclasses import dataclass

from hiplora.study.engine.jobs import Graph, Job
from hiplora.study.engine.store import Store
from hiplora.study.steps.registry import step


@dataclass(frozen=True)
class Todo:
    """Jobs that can be done now, jobs that wait for others, failed ones, and those behind a failed one."""

    ready: list[Job]
    waiting: list[Job]
    failed: list[Job]
    blocked: list[Job]

    @property
    def open(self) -> int:
        """Number of jobs that can still be done."""
        return len(self.ready) + len(self.waiting)


def todo(graph: Graph, store: Store, run: str) -> Todo:
    """Return what is left to do in the run named `run`, in the graph's order.

    A job whose result is there is done, unless a job that is left needs its artifact and that is not there (results
    that were taken over from elsewhere): then it is done again for the artifact. Nothing is done that no wanted
    result hangs on.
    """
    wanted = _wanted(graph, store)
    found = Todo([], [], [], [])
    bad: set[str] = set()
    for job in graph:
        if job.key not in wanted:
            continue
        if store.failure(job, run) is not None:
            found.failed.append(job)
            bad.add(job.key)
        elif any(need.key in bad for need in job.needs.values()):
            found.blocked.append(job)
            bad.add(job.key)
        elif any(need.key in wanted for need in job.needs.values()):
            found.waiting.append(job)
        else:
            found.ready.append(job)
    return found


def done(job: Job, store: Store, for_artifact: bool) -> bool:
    """Whether nothing is left to do for a job; `for_artifact` where a later job reads what it made."""
    if not store.finished(job):
        return False
    lacks = for_artifact and step(job.kind).makes and not store.has_artifact(job)
    return not lacks or store.diverged(job) is not None


def _wanted(graph: Graph, store: Store) -> set[str]:
    left = [job for job in graph.wanted if not store.finished(job)]
    wanted: set[str] = set()
    while left:
        job = left.pop()
        if job.key in wanted:
            continue
        wanted.add(job.key)
        left += [need for need in job.needs.values() if not done(need, store, step(job.kind).reads)]
    return wanted
