"""Choose among jobs by what they found: a learning rate by the loss on held-out rows, say.

Settings: `field` of the results, averaged over the candidates' jobs; `prefer`, `low` or `high`; `candidates`, a list of
{value, needs: names of the jobs that speak for it}.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hiplora.errors import HipLoraError
from hiplora.study.engine.jobs import DIVERGED, Job

if TYPE_CHECKING:
    from hiplora.study.engine.bench import Bench


def work(bench: "Bench", job: Job, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the best candidate's value, and every candidate's mean; the first of equal ones wins.

    A candidate that diverged, in training or before it, has no mean, and is not chosen.
    """
    means = [_mean(bench, job, settings["field"], candidate["needs"]) for candidate in settings["candidates"]]
    sign = 1 if settings["prefer"] == "low" else -1
    usable = {index: mean for index, mean in enumerate(means) if mean is not None}
    if not usable:
        raise HipLoraError(
            f"{job.name}: no candidate has a finite {settings['field']}; there is nothing to choose, give lower rates"
        )
    best = min(usable, key=lambda index: sign * usable[index])
    values = [candidate["value"] for candidate in settings["candidates"]]
    tried = [{"value": value, "mean": mean} for value, mean in zip(values, means, strict=True)]
    return {"value": values[best], "tried": tried, "at_the_edge": best in (0, len(values) - 1)}, {}


def _mean(bench: "Bench", job: Job, field: str, needs: list[str]) -> float | None:
    found = [bench.result(job.needs[name]) for name in needs]
    if any(DIVERGED in one for one in found):
        return None
    mean = sum(float(one[field]) for one in found) / len(found)
    return mean if math.isfinite(mean) else None
