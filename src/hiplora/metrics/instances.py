"""Which merges to try: task subsets and the seeds of their adapters, the same for every method."""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from hiplora.errors import ConfigError
from hiplora.metrics.checks import integer

MergeInstance = tuple[tuple[str, int], ...]  # (task, seed of its adapter), in the pool's order of tasks


def merge_instances(
    tasks: Sequence[str], sizes: Sequence[int], seeds: Sequence[int], count: int, seed: int
) -> dict[int, list[MergeInstance]]:
    """Draw the merges of the paper's protocol: for each size T, `count` distinct ones.

    A merge is a subset of T tasks, uniform among all, and for each of them one of the training seeds, uniform.
    Where no more than `count` distinct ones exist, all are returned. What is drawn depends on the arguments only
    (and on no other size): draw once, use the same for every method. The paper draws so many "per seed": call this
    once for each, with that `seed`.

    Args:
        tasks: the pool.
        sizes: numbers of tasks T to merge, each from 2 to the size of the pool.
        seeds: the seeds that adapters of every task were trained with.
        count: how many merges of each size.
        seed: of the drawing, at least 0.

    Returns:
        Size → merges; a merge is a tuple of (task, training seed) in the pool's order.

    Raises:
        ConfigError: an argument is out of range, or a task, seed or size is named twice.

    Source: HiP-LoRA, appendix C.3.
    """
    for name, given in (("tasks", tasks), ("sizes", sizes), ("seeds", seeds)):
        if not len(given) or len(set(given)) < len(given):
            raise ConfigError(f"{name} are {list(given)}; expected at least one, and none twice")
    integer(count, "count", 1)
    integer(seed, "seed", 0)
    for size in sizes:
        if integer(size, "size", 2) > len(tasks):
            raise ConfigError(f"size is {size}, and the pool has {len(tasks)} tasks; lower it or add tasks")
    return {size: _draw(tasks, size, seeds, count, np.random.default_rng([seed, size])) for size in sizes}


def _draw(
    tasks: Sequence[str], size: int, seeds: Sequence[int], count: int, generator: np.random.Generator
) -> list[MergeInstance]:
    total = math.comb(len(tasks), size) * len(seeds) ** size
    if total <= 2 * count:
        everything = list(_all(tasks, size, seeds))
        kept = generator.choice(total, min(count, total), replace=False)
        return [everything[index] for index in sorted(kept)]
    drawn: dict[MergeInstance, None] = {}
    while len(drawn) < count:
        subset = sorted(generator.choice(len(tasks), size, replace=False))
        trained = generator.integers(len(seeds), size=size)
        drawn[tuple((tasks[i], seeds[j]) for i, j in zip(subset, trained, strict=True))] = None
    return list(drawn)


def _all(tasks: Sequence[str], size: int, seeds: Sequence[int]) -> Iterator[MergeInstance]:
    for subset in itertools.combinations(tasks, size):
        for trained in itertools.product(seeds, repeat=size):
            yield tuple(zip(subset, trained, strict=True))
