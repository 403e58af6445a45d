"""What merges broke, from scores item by item: MergeFail and the mean drop, with intervals over the items."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hiplora.metrics import DEFAULT_TAUS, Resampler, fails, percentile_interval

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
    resampler = Resampler(seed)
    draws = [
        tuple(
            {task: resampler.mean(task, items) for task, items in side.items()}
            for side in (one.before, one.after)
        )
        for one in instances
    ]
    failing = {}
    for tau in DEFAULT_TAUS:
        failed = np.mean([fails(after, before, tau) for before, after in draws], axis=0)
        failing[f"{tau:g}"] = asdict(percentile_interval(failed)) | {"share": float(failed[1:].mean())}
    drops = [np.abs(before[task] - after[task]) for before, after in draws for task in before]
    return {"merge_fail": failing, "mean_drop": asdict(percentile_interval(np.mean(drops, axis=0)))}
