"""The kinds of jobs, each with the version of what it computes and the function that does it."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hiplora.errors import HipLoraError

Found = tuple[dict[str, Any], dict[str, Any]]  # the result, which depends on the job alone; times and memory


@dataclass(frozen=True)
class Step:
    """A kind of job.

    `version` goes up when the same settings give other results than before: jobs of older versions are done again.
    `makes`: it leaves an artifact; `reads`: it needs the artifacts of the jobs before it; `alone`: no other job of the
    study may run meanwhile, since it measures speed. `function` is `FILE:NAME` in this package; it takes a context, a
    job, and the job's settings with every `$result` filled in.
    """

    kind: str
    function: str
    version: int = 1
    makes: bool = False
    reads: bool = False
    alone: bool = False

    @property
    def work(self) -> Callable[..., Found]:
        """The function that does it, loaded on first use."""
        file, _, name = self.function.partition(":")
        return getattr(importlib.import_module(f"{__name__}.{file}"), name)


STEPS: Mapping[str, Step] = {
    step.kind: step
    for step in (
        Step("train", "train:train_adapter", makes=True, reads=True),
        Step("evaluate", "measure:evaluate", reads=True),
        Step("merge", "measure:merge_adapters", reads=True),
        Step("collect", "measure:collect"),
        Step("factorize", "train:factorize"),
        Step("inspect", "measure:inspect", reads=True),
        Step("edit", "measure:edit"),
        Step("probe", "measure:probe"),
        Step("speed", "train:speed", alone=True),
    )
}


def step(kind: str) -> Step:
    """Return the step of a kind of job."""
    if kind not in STEPS:
        raise HipLoraError(f"job kind {kind!r} is not known; expected one of {', '.join(STEPS)}")
    return STEPS[kind]


def rounded(value: Any, digits: int = 6) -> Any:
    """Return JSON values with every float rounded to so many significant digits; tuples become lists."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, Mapping):
        return {key: rounded(inner, digits) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(inner, digits) for inner in value]
    return value
