"""Whether a difference between two methods could be chance: a paired sign-flip test."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hiplora.errors import DataError
from hiplora.metrics.checks import finite, integer

_EXACT = 16  # differences whose 2ⁿ sign patterns are all tried
_CHUNK = 1 << 19  # signs drawn at once
_ROUNDING = 1e-12  # relative to all differences: patterns that tie with the observed one count as such


def sign_flip_p_value(
    one: Sequence[ArrayLike],
    other: Sequence[ArrayLike],
    permutations: int = 10_000,
    seed: int = 0,
) -> float:
    """Return the two-sided p-value, in (0, 1], of "neither method is better", from sign flips of paired differences.

    If the methods were alike, each instance's difference would be as likely with the other sign. The p-value is the
    share of sign patterns whose |mean over seeds of the mean over instances| is at least the observed one. Instances
    that do not differ do not matter; with up to 16 that do, all patterns are tried, else `permutations` random ones,
    and (1 + hits) / (1 + permutations) is returned. Symmetric in the two methods.

    Every instance is taken as independent, given the seeds: the test does not ask what other training seeds would
    have given. To ask that, pass one list with the mean of each seed; with S seeds, no p-value is below 2 / 2^S then
    (0.25 with three).

    Args:
        one: `one[seed][instance]`, as a method's values of `paired_bootstrap`.
        other: those of the other method, for the same instances.
        permutations: number of random patterns.
        seed: of the random patterns, at least 0.

    Raises:
        ConfigError: `permutations` or `seed` is out of range.
        DataError: there are no seeds or instances, their numbers differ, or a value is not finite.
    """
    integer(permutations, "permutations", 1)
    integer(seed, "seed", 0)
    parts = _weighted_differences(one, other)
    parts = parts[parts != 0]
    least = abs(parts.sum()) - _ROUNDING * abs(parts).sum()
    if len(parts) <= _EXACT:
        patterns = np.arange(2 ** len(parts))[:, None] >> np.arange(len(parts)) & 1
        return float((abs((2 * patterns - 1) @ parts) >= least).mean())
    generator = np.random.default_rng(seed)
    hits = sum(
        int((abs(signs @ parts) >= least).sum())
        for signs in _random_signs(permutations, len(parts), generator)
    )
    return (1 + hits) / (1 + permutations)


def _weighted_differences(one: Sequence[ArrayLike], other: Sequence[ArrayLike]) -> NDArray[np.float64]:
    """Return all instances' differences, each with its weight in the mean over seeds of means over instances."""
    if len(one) != len(other) or not len(one):
        raise DataError(f"there are {len(one)} and {len(other)} seeds; expected as many, at least 1")
    found = []
    for index, pair in enumerate(zip(one, other, strict=True)):
        first, second = finite(pair[0], f"one[{index}]"), finite(pair[1], f"other[{index}]")
        if len(first) != len(second):
            raise DataError(f"seed {index} has {len(first)} and {len(second)} instances; expected as many")
        found.append((first - second) / len(first) / len(one))
    return np.concatenate(found)


def _random_signs(count: int, size: int, generator: np.random.Generator) -> Iterator[NDArray[np.float64]]:
    """Yield (rows, size) of random signs, `count` rows in all."""
    step = max(1, _CHUNK // size)
    for first in range(0, count, step):
        rows = min(step, count - first)
        yield np.where(generator.integers(2, size=(rows, size), dtype=np.int8), 1.0, -1.0)
