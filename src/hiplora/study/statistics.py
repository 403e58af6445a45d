"""Estimates with intervals, for whatever is computed from scores item by item.

Every number is computed once from the items as they are, and again in each of 10,000 replicates, in which a task's
items are drawn with replacement, the same for all methods, seeds and merges: what was scored on the same items stays
paired. An item counts with its mean over the seeds, so that seeds that share their items do not make intervals too
narrow (docs/metrics.md). `hierarchical` is the paper's own interval beside it.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hiplora.metrics import paired_bootstrap, student_margin

REPLICATES = 10_000
FAR = 1e6  # a ratio beyond which a side of an interval counts as open
Draws = NDArray[np.float64]  # (1 + replicates,): the value itself, then the replicates'


@dataclass(frozen=True)
class Estimate:
    """A value with the bounds of its 95 % interval; `sd` is the standard deviation over seeds, where there are some."""

    value: float
    low: float | None = None
    high: float | None = None
    sd: float | None = None

    @property
    def half(self) -> float | None:
        """Half the width of the interval: of a difference, the smallest that it can tell from none."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


class Resampler:
    """Draws the items of each task, once for everything that is computed from them."""

    def __init__(self, seed: int = 0, replicates: int = REPLICATES):
        """Take the seed of the draws and their number."""
        self._seed, self._replicates = seed, replicates
        self._counts: dict[tuple[str, int], NDArray[np.float32]] = {}

    def mean(self, task: str, items: ArrayLike) -> Draws:
        """Return the mean over a task's items and, behind it, that of every replicate."""
        values = np.asarray(items, dtype=np.float32)
        # Divided in double precision: sums of right answers are exact, and so is then a score that equals a threshold.
        drawn = (self._drawn(task, len(values)) @ values).astype(float) / len(values)
        return np.concatenate([[float(np.mean(np.asarray(items, dtype=float)))], drawn])

    def _drawn(self, task: str, count: int) -> NDArray[np.float32]:
        if (task, count) not in self._counts:
            generator = np.random.default_rng([self._seed, zlib.crc32(task.encode()), count])
            drawn = generator.multinomial(count, np.full(count, 1 / count), size=self._replicates)
            self._counts[task, count] = drawn.astype(np.float32)
        return self._counts[task, count]


def estimate(draws: Draws, by_seed: Sequence[float] = ()) -> Estimate:
    """Return a value with the interval of its replicates, and the spread of its values by seed."""
    low, high = np.quantile(draws[1:], (0.025, 0.975))
    return Estimate(float(draws[0]), float(low), float(high), spread(by_seed))


def ratio(here: Draws, there: Draws) -> Estimate:
    """Return one value over another with the interval of the ratios r that here − r·there may be none at (Fieller).

    Where the other's replicates are all positive these are the quantiles of the ratio; where some are not, a side may
    be open (None). Where the value itself is not positive, the ratio is infinite and has no interval.
    """
    if not there[0] > 0:
        return Estimate(math.inf)
    if bool((there > 0).all()):
        return estimate(here / there)
    value = float(here[0] / there[0])
    return Estimate(value, _last(here, there, value, -1), _last(here, there, value, 1))


def _last(here: Draws, there: Draws, value: float, side: int) -> float | None:
    """The last ratio on a side of `value` that the replicates allow, None where they allow every one."""

    def allowed(r: float) -> bool:
        return bool(np.mean(side * (here[1:] - r * there[1:]) >= 0) >= 0.025)

    inside, outside = value, value + side * max(1.0, abs(value))
    while allowed(outside):
        inside, outside = outside, value + 2 * (outside - value)
        if abs(outside) > FAR:
            return None
    for _ in range(60):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if allowed(middle) else (inside, middle)
    return round(inside, 6)  # replicates are exact to about 1e-7


def spread(by_seed: Sequence[float]) -> float | None:
    """Return the standard deviation over seeds, None for fewer than two."""
    return float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else None


def over_seeds(items: Sequence[Sequence[float]]) -> list[float]:
    """Return each item's mean over the seeds: `items[seed][item]`."""
    return np.mean(np.asarray(items, dtype=float), axis=0).tolist()


def by_seed(values: Sequence[float], seeds: int) -> NDArray[np.float64]:
    """Return values that stand seed after seed, equally many of each, as (seeds, values a seed)."""
    return np.reshape(np.asarray(values, dtype=float), (seeds, -1))


def hierarchical(values: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, Estimate]:
    """Return the paper's interval of each method's mean, of `values[method][seed][instance]`: seeds are drawn, then
    instances within each.
    """
    if not values:
        return {}
    found = paired_bootstrap(values)
    return {name: Estimate(one.estimate, one.low, one.high) for name, one in found.mean.items()}


def student(values: Sequence[float]) -> Estimate:
    """Return the mean of values, one a seed, with the interval of Student's t over them; of one value there is none."""
    middle, sd = float(np.mean(values)), spread(values)
    if sd is None:
        return Estimate(middle)
    margin = student_margin(sd, len(values))
    return Estimate(middle, middle - margin, middle + margin, sd)


def geometric(values: Sequence[float]) -> Estimate:
    """Return the geometric mean of positive values, with the interval of Student's t over them (their logarithms)."""
    logs = student(np.log(np.asarray(values, dtype=float)).tolist())
    if logs.low is None or logs.high is None:
        return Estimate(math.exp(logs.value))
    return Estimate(math.exp(logs.value), math.exp(logs.low), math.exp(logs.high))
