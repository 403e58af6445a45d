"""What merges broke, from scores item by item: MergeFail and the mean drop, with intervals over the items."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hiplora.metrics import DEFAULT_TAUS, fails, percentile_interval, resampled_means

Items = Sequence[float]


@dataclass(frozen=True)
class Instance:
    """One merge of several adapters: each task's scores before it (its adapter alone) and after, item by item."""

    before: Mapping[str, Items]
    after: Mapping[str, Items]


def judge(instances: Sequence[Instance], seed: int = 0) -> dict[str, Any]:
    """Return MergeFail over the τ table and the mean absolute drop of some merges, with 95 % intervals.

    Each of 10,000 replicates draws every task's items with replacement, the same for all scores on them. A single
    merge either fails or does not: its estimate is 0 or 1, and `share` is the share of replicates in which it fails.
    """
    draws: list[tuple[dict[str, Any], dict[str, Any]]] = [({}, {}) for _ in instances]
    for place, task in enumerate(dict.fromkeys(task for one in instances for task in one.before)):
        having = [index for index, one in enumerate(instances) if task in one.before]
        sides = [side[task] for index in having for side in (instances[index].before, instances[index].after)]
        means = resampled_means(np.transpose(sides), seed=[seed, place]).T
        for index, before, after in zip(having, means[::2], means[1::2], strict=True):
            draws[index][0][task], draws[index][1][task] = before, after
    failing = {}
    for tau in DEFAULT_TAUS:
        failed = np.mean([fails(after, before, tau) for before, after in draws], axis=0)
        failing[f"{tau:g}"] = asdict(percentile_interval(failed)) | {"share": float(failed[1:].mean())}
    drops = [np.abs(before[task] - after[task]) for before, after in draws for task in before]
    return {"merge_fail": failing, "mean_drop": asdict(percentile_interval(np.mean(drops, axis=0)))}
