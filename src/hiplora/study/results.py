"""What a study's jobs found, as protocols ask for it."""

from typing import Any

from hiplora.study.engine.jobs import Job
from hiplora.study.engine.store import Store


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
        """Return what a job found, None (and note it) where it is not done, or its training diverged."""
        found = self._store.result(job)
        if found is None:
            self.missing[job.name] = None
        elif self._store.diverged(job) is not None:
            self.lost[job.name] = None
            return None
        return found

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
