"""A study's jobs, each named by the hash of everything its result depends on, and the graph that they form."""

import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hiplora.provenance import json_sha256

RESULT = "$result"  # {"$result": "need.field"}: a setting that is the result of another job
DIVERGED = "diverged"  # the only field in the result of a training that diverged: the reason


@dataclass(frozen=True)
class Kind:
    """A kind of job; `steps.STEPS` has its function.

    `makes`: it leaves an artifact; `reads`: it needs the artifacts of the jobs before it; `alone`: no other job may run
    meanwhile, since it measures speed. `version` goes up when the same settings give other results than before.
    """

    makes: bool = False
    reads: bool = False
    alone: bool = False
    version: int = 1


KINDS = {
    "train": Kind(makes=True, reads=True),
    "evaluate": Kind(reads=True),
    "merge": Kind(reads=True),
    "collect": Kind(),
    "factorize": Kind(),
    "inspect": Kind(reads=True),
    "edit": Kind(),
    "probe": Kind(),
    "speed": Kind(alone=True),
}


@dataclass(frozen=True, eq=False)
class Job:
    """One piece of work: a kind with its settings, on the results of other jobs. Jobs of one key are equal.

    `settings` are JSON values and hold everything that the result depends on, hashes of data and model included; one
    may be `{"$result": "NEED.FIELD"}`, a field in the result of `needs[NEED]`. `name` is for people.
    """

    kind: str
    version: int
    name: str
    settings: Mapping[str, Any]
    needs: Mapping[str, "Job"] = field(default_factory=dict)

    @functools.cached_property
    def key(self) -> str:
        """The job's name in the store: equal keys mean equal results."""
        return key_of(self.kind, self.version, self.settings, {name: job.key for name, job in self.needs.items()})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Job) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def key_of(kind: str, version: int, settings: Mapping[str, Any], needs: Mapping[str, str]) -> str:
    """Return the key of a job; `needs` maps names to the keys of the jobs it needs."""
    return json_sha256({"kind": kind, "version": version, "settings": dict(settings), "needs": dict(needs)})[:20]


def result(need: str, name: str) -> dict[str, str]:
    """Return the setting that stands for a field of a needed job's result."""
    return {RESULT: f"{need}.{name}"}


def filled(settings: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return settings with every `$result` filled in from `results[need]`."""

    def fill(value: dict[str, Any]) -> Any:
        if value.keys() != {RESULT}:
            return value
        need, _, name = value[RESULT].partition(".")
        return results[need][name]

    return json.loads(json.dumps(settings), object_hook=fill)


class Graph:
    """The `wanted` jobs and everything they need, each once, needed jobs first, else in the order of `wanted`."""

    def __init__(self, wanted: Iterable[Job]):
        self.wanted = tuple(dict.fromkeys(wanted))
        self._jobs: dict[Job, None] = {}
        self._add(self.wanted)

    def _add(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            if job not in self._jobs:
                self._add(job.needs.values())
                self._jobs[job] = None

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs)

    def __len__(self) -> int:
        return len(self._jobs)
