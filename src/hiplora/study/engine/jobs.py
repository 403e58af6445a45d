"""A study's jobs: each named by the hash of everything that its result depends on, and the graph that they form."""

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hiplora.errors import HipLoraError
from hiplora.provenance import json_sha256

RESULT = "$result"  # {"$result": "need.field"}: a setting that is the result of another job
KEY_LENGTH = 20


DIVERGED = "diverged"  # all that is found of a training that ended in numbers that are not finite: why


@dataclass(frozen=True, eq=False)
class Job:
    """One piece of work: a kind of step with its settings, over the results of other jobs.

    `settings` are JSON values that hold everything that the result depends on, hashes of data and model among them;
    `version` is that of the step's code. A setting may be `{"$result": "NEED.FIELD"}`: what the job `needs[NEED]`
    found. `name` is for people and no part of the key.
    """

    kind: str
    version: int
    name: str
    settings: Mapping[str, Any]
    needs: Mapping[str, "Job"] = field(default_factory=dict)

    @functools.cached_property
    def key(self) -> str:
        """The job's name in the store: equal keys mean equal results."""
        needs = {name: job.key for name, job in self.needs.items()}
        return key_of(self.kind, self.version, self.settings, needs)

    def __eq__(self, other: object) -> bool:
        """Two jobs are one if their keys are."""
        return isinstance(other, Job) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def to_json(self) -> dict[str, Any]:
        """Return the job as JSON values, the jobs that it needs by their keys."""
        return {
            "key": self.key,
            "kind": self.kind,
            "version": self.version,
            "name": self.name,
            "settings": dict(self.settings),
            "needs": {name: need.key for name, need in self.needs.items()},
        }

    def resolved(self, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Return the settings with every `$result` filled in from `results[need]`."""
        return _fill(self.settings, results, self.name)


def key_of(kind: str, version: int, settings: Mapping[str, Any], needs: Mapping[str, str]) -> str:
    """Return the key of a job; `needs` are the keys of the jobs that it needs, by name."""
    parts = {"kind": kind, "version": version, "settings": dict(settings), "needs": dict(needs)}
    return json_sha256(parts)[:KEY_LENGTH]


def is_result(value: Any) -> bool:
    """Whether a setting stands for a result of another job."""
    return isinstance(value, Mapping) and set(value) == {RESULT}


def result(need: str, name: str) -> dict[str, str]:
    """Return the setting that stands for a field of an upstream job's result."""
    return {RESULT: f"{need}.{name}"}


def _fill(value: Any, results: Mapping[str, Mapping[str, Any]], job: str) -> Any:
    if is_result(value):
        need, _, name = value[RESULT].partition(".")
        try:
            return results[need][name]
        except KeyError:
            raise HipLoraError(
                f"{job}: its setting {value[RESULT]} is in no result; this is a defect of the study's recipe"
            ) from None
    if isinstance(value, Mapping):
        return {key: _fill(inner, results, job) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_fill(inner, results, job) for inner in value]
    return value


class Graph:
    """The jobs that a study wants, and everything that they need, each once, what is needed first."""

    def __init__(self, wanted: Iterable[Job]):
        """Order the jobs; the order of `wanted` is kept as far as needs allow."""
        self.wanted: tuple[Job, ...] = tuple(dict.fromkeys(wanted))
        self._jobs: dict[str, Job] = {}
        for job in self.wanted:
            self._add(job)

    def _add(self, job: Job) -> None:
        if job.key in self._jobs:
            return
        for need in job.needs.values():
            self._add(need)
        self._jobs[job.key] = job

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs.values())

    def __len__(self) -> int:
        return len(self._jobs)

    def __getitem__(self, key: str) -> Job:
        return self._jobs[key]

    def counts(self) -> dict[str, int]:
        """Return the number of jobs of each kind."""
        found: dict[str, int] = {}
        for job in self:
            found[job.kind] = found.get(job.kind, 0) + 1
        return found

    def to_json(self) -> dict[str, Any]:
        """Return the graph as JSON values, which `from_json` reads."""
        return {
            "wanted": [job.key for job in self.wanted],
            "jobs": [job.to_json() for job in self],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Graph":
        """Read a graph that `to_json` wrote.

        Raises:
            HipLoraError: a job's key is not that of what it says: the file was changed, or is another version's.
        """
        jobs: dict[str, Job] = {}
        for line in value["jobs"]:
            needs = {name: jobs[key] for name, key in line["needs"].items()}
            job = Job(line["kind"], line["version"], line["name"], line["settings"], needs)
            if job.key != line["key"]:
                raise HipLoraError(
                    f"job {line['name']}: its key is {job.key}, and {line['key']} is written down"
                )
            jobs[job.key] = job
        return cls(jobs[key] for key in value["wanted"])
