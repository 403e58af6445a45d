"""Draw at random: the paper's hierarchical bootstrap, a plain one, sign flips, and the merges to try."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hiplora.errors import ConfigError, DataError
from hiplora.metrics.scores import Floats, finite, whole_number

MergeInstance = tuple[tuple[str, int], ...]  # (task, seed of its adapter), in the pool's order of tasks
_CHUNK = 1 << 20  # draws in memory at once
_EXACT = 16  # differences whose 2ⁿ sign patterns are all tried


@dataclass(frozen=True)
class Interval:
    """An estimate and the bounds of its interval, in the unit of the values."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class BootstrapResult:
    """Intervals of every method's mean and of every paired difference `(a, b)`, a − b, in both orders."""

    mean: Mapping[str, Interval]
    difference: Mapping[tuple[str, str], Interval]


def paired_bootstrap(
    values: Mapping[str, Sequence[Sequence[float]]], replicates: int = 10_000, seed: int = 0, level: float = 0.95
) -> BootstrapResult:
    """Return percentile intervals of means and paired differences from a hierarchical bootstrap (paper, C.3).

    Each replicate draws seeds with replacement, and in each drawn seed instances with replacement; all methods get
    the same draw. The estimate is the mean over seeds of the mean over instances. With a single seed only instances
    are drawn, and the interval says nothing about other seeds.

    `values[method][seed][instance]` are finite, in any unit. The i-th instance of a seed is the same item for all
    methods; seeds may have different numbers of items. `level` is the share of the replicates inside the interval.

    Raises:
        ConfigError: `replicates`, `seed` or `level` is out of range.
        DataError: there are no methods, seeds or instances, their numbers differ between methods, or a value is not
            finite; the error names the method and the seed.
    """
    whole_number(replicates, "replicates", 1)
    whole_number(seed, "seed", 0)
    if not 0 < level < 1:
        raise ConfigError(f"level is {level}; expected a share in (0, 1), such as 0.95")
    blocks = _blocks(values)
    generator = np.random.default_rng(seed)
    seeds = generator.integers(len(blocks), size=(replicates, len(blocks)))
    means = np.empty((*seeds.shape, len(values)))
    for index, block in enumerate(blocks):
        is_drawn = seeds == index
        counts = _drawn_counts(len(block), int(is_drawn.sum()), generator)
        means[is_drawn] = np.concatenate([part @ block / len(block) for part in counts] or [means[is_drawn]])
    estimates = np.mean([block.mean(axis=0) for block in blocks], axis=0)
    draws = np.concatenate([estimates[None], means.mean(axis=1)])
    columns = dict(zip(values, draws.T, strict=True))
    pairs = itertools.permutations(values, 2)
    return BootstrapResult(
        {name: percentile_interval(column, level) for name, column in columns.items()},
        {(a, b): percentile_interval(columns[a] - columns[b], level) for a, b in pairs},
    )


def _blocks(values: Mapping[str, Sequence[Sequence[float]]]) -> list[Floats]:
    """Return, per seed, the values as (instances, methods)."""
    columns = {
        method: [finite(column, f"values[{method!r}][{index}]") for index, column in enumerate(seeds)]
        for method, seeds in values.items()
    }
    shapes = {method: [len(column) for column in seeds] for method, seeds in columns.items()}
    if not all(shape and shape == next(iter(shapes.values())) for shape in shapes.values()) or not shapes:
        raise DataError(
            f"values: instances per seed are {shapes or 'none'}; expected the same for every method, and at least one "
            "method and seed"
        )
    return [np.stack(blocks, axis=1) for blocks in zip(*columns.values(), strict=True)]


def _chunks(rows: int, size: int) -> Iterator[int]:
    """Split `rows` rows of `size` draws into numbers of rows that fit in memory."""
    step = max(1, _CHUNK // size)
    for first in range(0, rows, step):
        yield min(step, rows - first)


def _drawn_counts(size: int, replicates: int, generator: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """`resample_counts` by drawing indices: several times faster, from another random stream."""
    for rows in _chunks(replicates, size):
        drawn = generator.integers(size, size=(rows, size)) + size * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size)


def resample_counts(size: int, replicates: int, generator: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Yield how often each of `size` points is drawn in each replicate, in chunks of shape (rows, size)."""
    for rows in _chunks(replicates, size):
        yield generator.multinomial(size, np.full(size, 1 / size), size=rows)


def resampled_means(columns: ArrayLike, replicates: int = 10_000, seed: int | Sequence[int] = 0) -> Floats:
    """Return the means of columns (items, columns), then of replicates with shared draws: (1 + replicates, columns)."""
    values = finite(columns, "columns", axes=2)
    counts = resample_counts(len(values), replicates, np.random.default_rng(seed))
    return np.concatenate([values.mean(axis=0)[None], *(part @ values / len(values) for part in counts)])


def percentile_interval(draws: ArrayLike, level: float = 0.95) -> Interval:
    """Return the interval of a value and its replicates: `draws` has the value first."""
    values = np.asarray(draws, dtype=np.float64)
    low, high = np.quantile(values[1:], ((1 - level) / 2, (1 + level) / 2))
    return Interval(float(values[0]), float(low), float(high))


def sign_flip_p_value(
    one: Sequence[ArrayLike], other: Sequence[ArrayLike], permutations: int = 10_000, seed: int = 0
) -> float:
    """Return the two-sided p-value, in (0, 1], of "neither method is better", from sign flips of paired differences.

    The share of sign patterns whose `|mean over seeds of the mean over instances|` is at least the observed one: all
    patterns for up to 16 instances that differ, else `permutations` random ones and (1 + hits) / (1 + permutations).
    Instances count as independent given the seeds; to test over training seeds, pass one list with a mean per seed.

    `one[seed][instance]` and `other` are as a method's values in `paired_bootstrap`, and so are the errors.
    """
    whole_number(permutations, "permutations", 1)
    whole_number(seed, "seed", 0)
    blocks = _blocks({"one": one, "other": other})  # type: ignore[dict-item]
    parts = np.concatenate([(block[:, 0] - block[:, 1]) / len(block) / len(blocks) for block in blocks])
    parts = parts[parts != 0]
    least = abs(parts.sum()) - 1e-12 * abs(parts).sum()  # patterns that tie up to rounding count
    if len(parts) <= _EXACT:
        patterns = np.arange(2 ** len(parts))[:, None] >> np.arange(len(parts)) & 1
        return float((abs((2 * patterns - 1) @ parts) >= least).mean())
    generator, hits = np.random.default_rng(seed), 0
    for rows in _chunks(permutations, len(parts)):
        signs = 2.0 * generator.integers(2, size=(rows, len(parts)), dtype=np.int8) - 1.0
        hits += int((abs(signs @ parts) >= least).sum())
    return (1 + hits) / (1 + permutations)


def student_margin(sd: Any, count: Any) -> Any:
    """Return half of Student's 95 % interval of the mean of `count` values with sample deviation `sd`, elementwise."""
    from scipy import stats

    return stats.t.ppf(0.975, count - 1) * sd / count**0.5


def merge_instances(
    tasks: Sequence[str], sizes: Sequence[int], seeds: Sequence[int], count: int, seed: int
) -> dict[int, list[MergeInstance]]:
    """Draw the merges of the paper's protocol (appendix C.3): `count` distinct ones for each size T.

    A merge is a uniform subset of T of the `tasks`, each with one of the training `seeds`, uniform; all merges where
    there are no more than `count`. The draw depends on the arguments only, and on no other size: draw once and use the
    same merges for every method.

    Raises:
        ConfigError: a size is not in 2 … len(tasks), `count` or `seed` is out of range, or a task or seed is repeated.
    """
    whole_number(count, "count", 1)
    whole_number(seed, "seed", 0)
    for name, values in (("tasks", tasks), ("seeds", seeds)):
        if len(set(values)) != len(values):
            raise ConfigError(f"{name} are {values}; expected each of them once")
    for size in sizes:
        if whole_number(size, "size", 2) > len(tasks):
            raise ConfigError(f"size is {size}, and the pool has {len(tasks)} tasks; lower it or add tasks")
    return {size: _draw_merges(tasks, size, seeds, count, np.random.default_rng([seed, size])) for size in sizes}


def _draw_merges(
    tasks: Sequence[str], size: int, seeds: Sequence[int], count: int, generator: np.random.Generator
) -> list[MergeInstance]:
    total = math.comb(len(tasks), size) * len(seeds) ** size
    if total <= 2 * count:
        everything = [
            tuple(zip(subset, trained, strict=True))
            for subset in itertools.combinations(tasks, size)
            for trained in itertools.product(seeds, repeat=size)
        ]
        chosen = generator.choice(total, min(count, total), replace=False)
        return [everything[index] for index in sorted(chosen)]
    drawn: dict[MergeInstance, None] = {}
    while len(drawn) < count:
        subset = sorted(generator.choice(len(tasks), size, replace=False))
        trained = generator.integers(len(seeds), size=size)
        drawn[tuple((tasks[i], seeds[j]) for i, j in zip(subset, trained, strict=True))] = None
    return list(drawn)
