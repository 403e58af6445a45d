"""How certain a mean or a difference is: a hierarchical bootstrap that keeps methods paired."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hiplora.errors import ConfigError, DataError
from hiplora.metrics.checks import finite, integer
from hiplora.metrics.sign_flip import sign_flip_p_value

Values = Mapping[str, Sequence[Sequence[float]]]  # values[method][seed][instance]
Pair = tuple[str, str]

_CHUNK = 1 << 19  # instances drawn at once: a few MB of work


@dataclass(frozen=True)
class Interval:
    """An estimate and the bounds of its interval, in the unit of the values."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class BootstrapResult:
    """Intervals of every method's mean, and of every paired difference `(a, b)`, which is a − b, in both orders.

    `p_value[(a, b)]` is `sign_flip_p_value` of the pair; it is computed when it is asked for.
    """

    mean: Mapping[str, Interval]
    difference: Mapping[Pair, Interval]
    p_value: Mapping[Pair, float]


def paired_bootstrap(
    values: Values, replicates: int = 10_000, seed: int = 0, level: float = 0.95
) -> BootstrapResult:
    """Return percentile intervals of means and paired differences from a hierarchical bootstrap.

    In each replicate as many seeds are drawn with replacement as there are, and in each drawn seed as many instances
    with replacement as it has; every method gets the same draw. The estimate is the mean over seeds of the mean over
    instances: where seeds have different numbers of instances, each seed still weighs the same. With a single seed
    only instances are drawn, and the interval says nothing about other seeds.

    The i-th instance of a seed must be the same item for all methods; between seeds, items and their number may differ.

    Args:
        values: `values[method][seed][instance]`, finite, in any unit.
        replicates: number of replicates.
        seed: of the random numbers, at least 0; the same seed gives the same result.
        level: share of the replicates inside the interval, in (0, 1).

    Raises:
        ConfigError: `replicates`, `seed` or `level` is out of range.
        DataError: there are no methods, seeds or instances, their numbers differ between methods, or a value is not
            finite; the error names the method and the seed.

    Source: HiP-LoRA, appendix C.3. What the interval covers, and what it does not: docs/metrics.md.
    """
    integer(replicates, "replicates", 1)
    integer(seed, "seed", 0)
    if not 0 < level < 1:
        raise ConfigError(f"level is {level}; expected a share in (0, 1), as 0.95")
    blocks = _blocks(values)
    drawn = _replicate_means(blocks, replicates, np.random.default_rng(seed))
    estimates = np.mean([block.mean(axis=0) for block in blocks], axis=0)
    names, tails = list(values), ((1 - level) / 2, (1 + level) / 2)
    bounds = np.quantile(drawn, tails, axis=0)
    means = {name: Interval(float(estimates[i]), *map(float, bounds[:, i])) for i, name in enumerate(names)}
    differences: dict[Pair, Interval] = {}
    for i, j in itertools.combinations(range(len(names)), 2):
        low, high = map(float, np.quantile(drawn[:, i] - drawn[:, j], tails))
        estimate = float(estimates[i] - estimates[j])
        differences[names[i], names[j]] = Interval(estimate, low, high)
        # 0 − x and not −x: the other side of 0.0 is 0.0.
        differences[names[j], names[i]] = Interval(0 - estimate, 0 - high, 0 - low)
    columns = {name: [block[:, i] for block in blocks] for i, name in enumerate(names)}
    return BootstrapResult(means, differences, _PValues(columns, seed))


class _PValues(Mapping[Pair, float]):
    """P-values of all pairs, computed when they are asked for: a table that shows none pays for none."""

    def __init__(self, columns: Mapping[str, list[NDArray[np.float64]]], seed: int) -> None:
        self._columns, self._seed = columns, seed

    def __getitem__(self, pair: Pair) -> float:
        one, other = pair
        if one == other:
            raise KeyError(pair)
        return sign_flip_p_value(self._columns[one], self._columns[other], seed=self._seed)

    def __iter__(self) -> Iterator[Pair]:
        return itertools.permutations(self._columns, 2)

    def __len__(self) -> int:
        return len(self._columns) * (len(self._columns) - 1)


def _blocks(values: Values) -> list[NDArray[np.float64]]:
    """Return, per seed, the values as (instances, methods)."""
    if not values:
        raise DataError("values: has no method; expected values[method][seed][instance]")
    first = next(iter(values))
    for method, seeds in values.items():
        if len(seeds) != len(values[first]) or not len(seeds):
            raise DataError(
                f"method {method!r} has {len(seeds)} seeds, {first!r} has {len(values[first])}; "
                "expected the same number for every method, at least 1"
            )
    blocks = []
    for index in range(len(values[first])):
        columns = {
            method: finite(seeds[index], f"values[{method!r}][{index}]") for method, seeds in values.items()
        }
        for method, column in columns.items():
            if len(column) != len(columns[first]):
                raise DataError(
                    f"method {method!r}, seed {index} has {len(column)} instances, {first!r} has "
                    f"{len(columns[first])}; expected the same instances for every method"
                )
        blocks.append(np.stack(list(columns.values()), axis=1))
    return blocks


def _replicate_means(
    blocks: Sequence[NDArray[np.float64]], replicates: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    """Return each replicate's mean over drawn seeds of the mean over drawn instances: (replicates, methods)."""
    drawn = generator.integers(len(blocks), size=(replicates, len(blocks)))
    means = np.empty((*drawn.shape, blocks[0].shape[1]))
    for index, block in enumerate(blocks):
        places = drawn == index
        means[places] = _resampled_means(block, int(places.sum()), generator)
    return means.mean(axis=1)


def _resampled_means(
    block: NDArray[np.float64], count: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    """Return `count` times the mean over instances drawn with replacement: (count, methods).

    How often each instance was drawn is counted, and the counts multiply the values of all methods in one matrix
    product: that is several times quicker than gathering the values.
    """
    size = len(block)
    means = np.empty((count, block.shape[1]))
    step = max(1, _CHUNK // size)
    for first in range(0, count, step):
        rows = min(step, count - first)
        drawn = generator.integers(size, size=(rows, size))
        drawn += size * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size)
        means[first : first + rows] = times.astype(np.float64) @ block / size
    return means
