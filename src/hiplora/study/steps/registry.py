"""Which step does a kind of job; the module that does it is loaded when it is first used."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from hiplora.errors import HipLoraError
from hiplora.study.engine.jobs import Job

if TYPE_CHECKING:
    from hiplora.study.engine.bench import Bench

Found = tuple[dict[str, Any], dict[str, Any]]


class Work(Protocol):
    """What a step does: from a job and its settings, all filled in, to its result and what was timed.

    The result depends on the job alone; whatever depends on the machine or the hour (seconds, memory) is timed.
    """

    def __call__(self, bench: "Bench", job: Job, settings: Mapping[str, Any]) -> Found:
        """Do the job."""


@dataclass(frozen=True)
class Step:
    """A kind of job.

    `version` goes up when the same settings give other results than before: jobs of older versions are done again.
    `makes` says that it leaves an artifact, `reads` that it needs those of the jobs before it, `alone` that nothing
    else of the study should run meanwhile, since it measures speed.
    """

    kind: str
    version: int
    makes: bool = False
    reads: bool = False
    alone: bool = False

    @property
    def work(self) -> Work:
        """The function that does it."""
        return importlib.import_module(f"hiplora.study.steps.{self.kind}").work


STEPS: Mapping[str, Step] = {
    step.kind: step
    for step in (
        Step("train", 1, makes=True, reads=True),
        Step("evaluate", 1, reads=True),
        Step("merge", 1, reads=True),
        Step("collect", 1),
        Step("factorize", 1),
        Step("inspect", 1, reads=True),
        Step("edit", 1),
        Step("probe", 1),
        Step("speed", 1, alone=True),
    )
}


def step(kind: str) -> Step:
    """Return the step of a kind of job."""
    try:
        return STEPS[kind]
    except KeyError:
        raise HipLoraError(f"job kind {kind!r} is not known; expected one of {', '.join(STEPS)}") from None
