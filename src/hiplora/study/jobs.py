"""A study's jobs: each named by the hash of everything its result depends on, and the graph they form."""

import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hiplora.errors import HipLoraError
from hiplora.provenance import json_sha256

RESULT = "$result"  # {"$result": "need.field"}: a setting that is the result of another job
DIVERGED = "diverged"  # the only field in the result of a training that diverged: the reason
KEY_LENGTH = 20


@dataclass(frozen=True, eq=False)
class Job:
    """One piece of work: a kind of step with its settings, on the results of other jobs.

    `settings` are JSON values and hold everything the result depends on, hashes of data and model included;
    `version` is that of the step's code. A setting may be `{"$result": "NEED.FIELD"}`: a field in the result of
    `needs[NEED]`. `name` is for people and not part of the key.
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
        """Two jobs are equal if their keys are."""
        return isinstance(other, Job) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def to_json(self) -> dict[str, Any]:
        """Return the job as JSON values, with the keys of the jobs it needs."""
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
    """Return the key of a job; `needs` maps names to the keys of the jobs it needs."""
    parts = {"kind": kind, "version": version, "settings": dict(settings), "needs": dict(needs)}
    return json_sha256(parts)[:KEY_LENGTH]


def is_result(value: Any) -> bool:
    """Whether a setting stands for a result of another job."""
    return isinstance(value, Mapping) and set(value) == {RESULT}


def result(need: str, name: str) -> dict[str, str]:
    """Return the setting that stands for a field of a needed job's result."""
    return {RESULT: f"{need}.{name}"}


def _fill(value: Any, results: Mapping[str, Mapping[str, Any]], job: str) -> Any:
    if is_result(value):
        need, _, name = value[RESULT].partition(".")
        try:
            return results[need][name]
        except KeyError:
            raise HipLoraError(f"{job}: setting {value[RESULT]} is not in any result it needs") from None
    if isinstance(value, Mapping):
        return {key: _fill(inner, results, job) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_fill(inner, results, job) for inner in value]
    return value


class Graph:
    """The jobs a study wants and everything they need, each once, needed jobs first."""

    def __init__(self, wanted: Iterable[Job]):
        """Order the jobs; the order of `wanted` is kept as far as needs allow."""
        self.wanted: tuple[Job, ...] = tuple(dict.fromkeys(wanted))
        self._jobs: dict[str, Job] = {}
        for job in self.wanted:
            self._add(job)

    def _add(self, job: Job) -> None:
        if job.key not in self._jobs:
            for need in job.needs.values():
                self._add(need)
            self._jobs[job.key] = job

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs.values())

    def __len__(self) -> int:
        return len(self._jobs)

    def counts(self) -> Counter[str]:
        """Return the number of jobs of each kind."""
        return Counter(job.kind for job in self)
