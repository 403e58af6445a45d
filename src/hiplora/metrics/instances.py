"""Which merges to try: task subsets and the seeds of their adapters, the same for every method."""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from hiplora.errors import ConfigError
from hiplora.metrics.scores import whole_number

MergeInstance = tuple[tuple[str, int], ...]  # (task, seed of its adapter), in the pool's order of tasks


def merge_instances(
    tasks: Sequence[str], sizes: Sequence[int], seeds: Sequence[int], count: int, seed: int
) -> dict[int, list[MergeInstance]]:
    """Draw the merges of the paper's protocol: `count` distinct ones for each size T.

    A merge is a uniform subset of T of the `tasks`, each with one of the training `seeds`, uniform; all merges where
    there are no more than `count`. The draw depends on the arguments only, and on no other size: draw once and use the
    same merges for every method.

    Raises:
        ConfigError: a size is not in 2 … len(tasks), or `count` or `seed` is out of range.

    Source: HiP-LoRA, appendix C.3.
    """
    whole_number(count, "count", 1)
    whole_number(seed, "seed", 0)
    for size in sizes:
        if whole_number(size, "size", 2) > len(tasks):
            raise ConfigError(f"size is {size}, and the pool has {len(tasks)} tasks; lower it or add tasks")
    return {size: _draw(tasks, size, seeds, count, np.random.default_rng([seed, size])) for size in sizes}


def _draw(
    tasks: Sequence[str], size: int, seeds: Sequence[int], count: int, generator: np.random.Generator
) -> list[MergeInstance]:
    total = math.comb(len(tasks), size) * len(seeds) ** size
    if total <= 2 * count:
        everything = [
            tuple(zip(subset, trained, strict=True))
            for subset in itertools.combinations(tasks, size)
            for trained in itertools.product(seeds, repeat=size)
        ]
        kept = generator.choice(total, min(count, total), replace=False)
        return [everything[index] for index in sorted(kept)]
    drawn: dict[MergeInstance, None] = {}
    while len(drawn) < count:
        subset = sorted(generator.choice(len(tasks), size, replace=False))
        trained = generator.integers(len(seeds), size=size)
        drawn[tuple((tasks[i], seeds[j]) for i, j in zip(subset, trained, strict=True))] = None
    return list(drawn)
