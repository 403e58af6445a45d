"""What a merge broke: scores before and after it, MergeFail, and how certain that is, from scores item by item."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hiplora.metrics import DEFAULT_TAUS, mean_post_merge_drop, merge_fail
from hiplora.metrics.merging import fails

REPLICATES = 10_000
_CHUNK = 1_000  # replicates in memory at once
Items = Sequence[float]


@dataclass(frozen=True)
class Instance:
    """One merge of several adapters: what each of its tasks scored before it, alone, and after, item by item."""

    before: Mapping[str, Items]
    after: Mapping[str, Items]


def judge(instances: Sequence[Instance], seed: int = 0) -> dict[str, Any]:
    """Return MergeFail over the τ table and the mean absolute drop of some merges, with 95 % intervals.

    The intervals come from the items: in each of 10,000 replicates a task's items are drawn with replacement, the same
    for all that was scored on them, and everything is computed anew. A single merge either fails or does not: its
    estimate is 0 or 1, and `share` says in how many replicates it fails.
    """
    draws = _drawn_means(instances, seed)
    singles = [{task: _mean(items) for task, items in one.before.items()} for one in instances]
    merged = [{task: _mean(items) for task, items in one.after.items()} for one in instances]
    failing = {}
    for tau in DEFAULT_TAUS:
        failed = np.mean([fails(after, before, tau) for before, after in draws], axis=0)
        failing[f"{tau:g}"] = {
            "estimate": merge_fail(merged, singles, tau),
            **_bounds(failed),
            "share": float(failed.mean()),
        }
    drops = [np.abs(before[task] - after[task]) for before, after in draws for task in before]
    drop = {"estimate": mean_post_merge_drop(merged, singles), **_bounds(np.mean(drops, axis=0))}
    return {"merge_fail": failing, "mean_drop": drop}


def _mean(items: Items) -> float:
    return float(np.mean(items))


def _bounds(values: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(values, (0.025, 0.975))
    return {"low": float(low), "high": float(high)}


def _drawn_means(
    instances: Sequence[Instance], seed: int
) -> list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """Return, an instance, the means of its tasks before and after in every replicate.

    A task's items are drawn once a replicate for all instances: what was scored on the same items stays paired.
    """
    found: list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]] = [({}, {}) for _ in instances]
    generator = np.random.default_rng(seed)
    for task in dict.fromkeys(task for one in instances for task in one.before):
        having = [index for index, one in enumerate(instances) if task in one.before]
        columns = [items for i in having for items in (instances[i].before[task], instances[i].after[task])]
        means = _resampled(np.array(columns, dtype=float).T, generator)
        for place, index in enumerate(having):
            found[index][0][task], found[index][1][task] = means[:, 2 * place], means[:, 2 * place + 1]
    return found


def _resampled(items: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return (replicates, columns): the columns' means over items drawn with replacement."""
    count = len(items)
    chunks = []
    for first in range(0, REPLICATES, _CHUNK):
        size = min(_CHUNK, REPLICATES - first)
        drawn = generator.multinomial(count, np.full(count, 1 / count), size=size)
        chunks.append(drawn @ items / count)
    return np.concatenate(chunks)
