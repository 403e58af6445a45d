"""The kinds of jobs, each with the version of what it computes and the function that does it."""

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Found = tuple[dict[str, Any], dict[str, Any]]  # the result, which depends on the job alone; times and memory


@dataclass(frozen=True)
class Step:
    """A kind of job.

    `function` is `FILE:NAME` in this package; it takes a context, a job, and the job's settings with every `$result`
    filled in. `version` goes up when the same settings give other results than before: jobs of older versions are done
    again. `makes`: it leaves an artifact; `reads`: it needs the artifacts of the jobs before it; `alone`: no other job
    of the study may run meanwhile, since it measures speed.
    """

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


STEPS = {
    "train": Step("train:train_adapter", makes=True, reads=True),
    "evaluate": Step("measure:evaluate", reads=True),
    "merge": Step("measure:merge_adapters", reads=True),
    "collect": Step("measure:collect"),
    "factorize": Step("train:factorize"),
    "inspect": Step("measure:inspect", reads=True),
    "edit": Step("measure:edit"),
    "probe": Step("measure:probe"),
    "speed": Step("train:speed", alone=True),
}


def rounded(value: Any) -> Any:
    """Return JSON values with every float rounded to six significant digits."""
    return json.loads(json.dumps(value), parse_float=lambda text: float(f"{float(text):.6g}"))
