"""What a study's jobs found, as sections ask for it."""

from collections.abc import Mapping
from typing import Any

from hiplora.study.engine.jobs import Job
from hiplora.study.engine.store import Store

FORMS = ("accuracy", "likelihood")  # the two forms of every task's score
_FIELD = {"accuracy": "score", "likelihood": "likelihood"}


class Results:
    """The results in a store.

    `missing` lists by name the jobs that were asked for and are not done, `lost` those whose training diverged.
    """

    def __init__(self, store: Store):
        """Take a store; records are read when they are asked for."""
        self._store = store
        self.missing: dict[str, None] = {}
        self.lost: dict[str, None] = {}

    def get(self, job: Job) -> dict[str, Any] | None:
        """Return what a job found, None (and a note of it) where it is not done, or its training diverged."""
        found = self._store.result(job)
        if found is None:
            self.missing[job.name] = None
        elif self.diverged(job):
            self.lost[job.name] = None
            return None
        return found

    def diverged(self, job: Job) -> bool:
        """Whether a training ended in numbers that are not finite, or a job that needs one found so."""
        return self._store.diverged(job) is not None

    def timing(self, job: Job) -> dict[str, Any] | None:
        """Return what was timed of a job, None where it is not done."""
        record = self._store.record(job)
        return None if record is None else record["timing"]

    def provenance(self, job: Job) -> dict[str, Any] | None:
        """Return commit, machine and versions that did a job, None where it is not done."""
        record = self._store.record(job)
        return None if record is None else record["provenance"]

    def machine(self, job: Job) -> str:
        """Name the machine that did a job: its processor and cores."""
        machine = (self.provenance(job) or {}).get("machine", {})
        return f"{machine.get('processor')}, {machine.get('cores')} cores"

    def items(self, job: Job, task: str, form: str) -> list[float] | None:
        """Return the scores of a task, item by item, in per cent; None where they are not there."""
        found = self.get(job)
        return None if found is None else items(found, task, form)


def items(found: Mapping[str, Any], task: str, form: str) -> list[float] | None:
    """Return the scores of a task in a result of `evaluate` or `merge`, in one of `FORMS`."""
    scores = found["tasks"].get(task)
    return None if scores is None else scores[_FIELD[form]]


def drift(found: Mapping[str, Any]) -> dict[str, float]:
    """Return text → KL from the base in nats a token, of a result of `evaluate` or `merge`; empty without drift."""
    return {text: values["kl"] for text, values in (found["drift"] or {}).items()}
