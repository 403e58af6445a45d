"""Does a drop go with the singular value? Pearson and Spearman correlations with p-values and bootstrap intervals."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hiplora.errors import ConfigError, DataError
from hiplora.probing.run import ProbeRecord

RESAMPLING = ("directions", "modules")
LEAST = 3  # points; of two, every correlation is perfect
_LEVEL = 0.95
_EXACT = 8  # points up to which all pairings are tried
_CHUNK = 1 << 20  # counts in work at once: a few tens of MB

Floats = NDArray[np.float64]
Points = dict[tuple[str, int], tuple[float, float] | None]  # σ and drop of each direction (module, index)


@dataclass(frozen=True)
class Correlation:
    """A correlation coefficient, its two-sided p-value and the bounds of its 95 % bootstrap interval.

    Where it is not defined all four are None and `reason` says why; bounds alone are None where too few of the
    bootstrap's samples have a correlation.
    """

    estimate: float | None
    p_value: float | None
    low: float | None
    high: float | None
    reason: str = ""


@dataclass(frozen=True)
class Association:
    """How y goes with x over `points` points: linearly (Pearson) and in rank (Spearman)."""

    points: int
    pearson: Correlation
    spearman: Correlation


@dataclass(frozen=True)
class Finding:
    """The association of σ with the drop of one metric under one intervention.

    `type` is a type of module, or `"all"`. A point is a direction; its drops under several draws of noise are averaged.
    `left_out` are directions whose drop is not finite.
    """

    kind: str
    metric: str
    type: str
    left_out: int
    association: Association

    def as_dict(self) -> dict[str, Any]:
        """Return the finding for a results file."""
        named = {"kind": self.kind, "metric": self.metric, "type": self.type, "left_out": self.left_out}
        return named | asdict(self.association)


@dataclass(frozen=True)
class Contrast:
    """How much more the drop of one intervention goes with σ than that of another (`minus`), over the same directions.

    The differences of their correlations: without p-values, with the interval of the paired bootstrap.
    """

    kind: str
    minus: str
    metric: str
    points: int
    pearson: Correlation
    spearman: Correlation


def correlate(
    x: ArrayLike,
    y: ArrayLike,
    groups: Sequence[str] | None = None,
    *,
    replicates: int = 10_000,
    seed: int = 0,
) -> Association:
    """Return the correlations of y with x, each of shape (points,), with p-values and percentile intervals.

    Estimates and p-values are scipy's (`pearsonr`, `spearmanr`), which take the points for independent; of up to 8
    points Spearman's p-value is exact, over all pairings. The bootstrap
    draws as many points as there are, with replacement, x and y together. With `groups`, a name for each point, it
    draws as many groups as there are and then points within each drawn group: points of a group need not be
    independent then. Samples without a correlation (one value throughout) are passed over; where they are more than
    half, there is no interval.

    Raises:
        ConfigError: `replicates` is below 1.
        DataError: lengths differ or a value is not finite.
    """
    if replicates < 1:
        raise ConfigError(f"replicates is {replicates}; expected at least 1")
    first, second = _checked(x, "x"), _checked(y, "y")
    if len(first) != len(second) or (groups is not None and len(groups) != len(first)):
        raise DataError(
            f"{len(first)} x, {len(second)} y"
            + ("" if groups is None else f", {len(groups)} groups")
            + "; expected as many of each"
        )
    if reason := _undefined(first, second):
        nothing = _nothing(reason)
        return Association(len(first), nothing, nothing)
    sampled = _sampled(first, second, groups, replicates, seed)
    return Association(len(first), *_estimated(first, second, sampled))


def findings(
    records: Iterable[ProbeRecord], resample: str = "directions", *, replicates: int = 10_000, seed: int = 0
) -> list[Finding]:
    """Return the association of σ with every metric's drop, for each intervention, over all modules and by type.

    `resample` is what the bootstrap draws: `"directions"`, or `"modules"` and then directions within them.

    Raises:
        ConfigError: `resample` is neither.
    """
    _check_resampling(resample)
    rows = list(records)
    found = []
    for kind, metric, name, some in _divided(rows):
        points = _points(some, metric)
        present = {key: point for key, point in points.items() if point is not None}
        modules = [module for module, _ in present] if resample == "modules" else None
        xs, ys = [sigma for sigma, _ in present.values()], [drop for _, drop in present.values()]
        association = correlate(xs, ys, modules, replicates=replicates, seed=seed)
        found.append(Finding(kind, metric, name, len(points) - len(present), association))
    return found


def contrasts(
    records: Iterable[ProbeRecord], resample: str = "directions", *, replicates: int = 10_000, seed: int = 0
) -> list[Contrast]:
    """Return, for each metric and each two interventions, how far apart their correlations with σ are.

    The first in `records` minus the other, over the directions of all modules whose drop is finite under both; in
    each sample of the bootstrap both have the same directions. `resample` as of `findings`.

    Raises:
        ConfigError: `resample` is neither.
    """
    _check_resampling(resample)
    points: dict[str, dict[str, Points]] = {}
    for kind, metric, name, some in _divided(list(records)):
        if name == "all":
            points.setdefault(metric, {})[kind] = _points(some, metric)
    found = []
    pairs = [(metric, *pair) for metric in points for pair in itertools.combinations(points[metric], 2)]
    for metric, kind, minus in pairs:
        here, there = points[metric][kind], points[metric][minus]
        both = {
            key: (one[0], one[1], other[1])
            for key, one in here.items()
            if one is not None and (other := there.get(key)) is not None
        }
        modules = [module for module, _ in both] if resample == "modules" else None
        x, first, second = np.array(list(both.values())).reshape(-1, 3).T
        apart = _apart(x, first, second, modules, replicates, seed)
        found.append(Contrast(kind, minus, metric, len(both), *apart))
    return found


def _apart(
    x: Floats, first: Floats, second: Floats, groups: Sequence[str] | None, replicates: int, seed: int
) -> tuple[Correlation, Correlation]:
    """The correlations of x with `first` minus those with `second`."""
    if reason := _undefined(x, first) or _undefined(x, second):
        return _nothing(reason), _nothing(reason)
    ours, theirs = (_sampled(x, drops, groups, replicates, seed) for drops in (first, second))
    estimates = zip(_estimated(x, first, ours), _estimated(x, second, theirs), strict=True)
    values = [(one.estimate or 0.0) - (other.estimate or 0.0) for one, other in estimates]
    pearson, spearman = (
        Correlation(value, None, *_bounds(sampled))
        for value, sampled in zip(values, (ours - theirs).T, strict=True)
    )
    return pearson, spearman


def _divided(rows: Sequence[ProbeRecord]) -> Iterator[tuple[str, str, str, list[ProbeRecord]]]:
    """Yield intervention, metric, type and the rows of each."""
    types = list(dict.fromkeys(row.type for row in rows))
    for kind in dict.fromkeys(row.kind for row in rows):
        of_kind = [row for row in rows if row.kind == kind]
        for metric in of_kind[0].drop:
            yield kind, metric, "all", of_kind
            for name in types if len(types) > 1 else ():
                yield kind, metric, name, [row for row in of_kind if row.type == name]


def _points(rows: Sequence[ProbeRecord], metric: str) -> Points:
    """Return σ and mean drop of each direction, by module and index; None where a drop is not finite."""
    drops: dict[tuple[str, int], list[float | None]] = {}
    sigmas = {(row.module, row.index): row.sigma for row in rows}
    for row in rows:
        drops.setdefault((row.module, row.index), []).append(row.drop[metric])
    points: Points = {}
    for key, values in drops.items():
        finite = [value for value in values if value is not None]
        whole = len(finite) == len(values)
        points[key] = (sigmas[key], math.fsum(finite) / len(finite)) if whole else None
    return points


def _check_resampling(resample: str) -> None:
    if resample not in RESAMPLING:
        raise ConfigError(f"resample is {resample!r}; expected one of {', '.join(RESAMPLING)}")


def _checked(values: ArrayLike, what: str) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise DataError(f"{what}: has shape {array.shape}; expected a list of numbers")
    if not np.isfinite(array).all():
        place = int(np.flatnonzero(~np.isfinite(array))[0])
        raise DataError(f"{what}[{place}] is {array[place]}; expected a finite number")
    return array


def _undefined(x: Floats, y: Floats) -> str:
    if len(x) < LEAST:
        return f"{len(x)} directions; a correlation takes at least {LEAST}"
    for values, what in ((x, "singular values"), (y, "drops")):
        if (values == values[0]).all():
            return f"all {what} are equal ({values[0]:g})"
    return ""


def _nothing(reason: str) -> Correlation:
    return Correlation(None, None, None, None, reason)


def _sampled(x: Floats, y: Floats, groups: Sequence[str] | None, replicates: int, seed: int) -> Floats:
    """Return the correlations of bootstrap samples, (replicates, 2); the draws hang on groups and seed alone."""
    members = [np.arange(len(x))]
    if groups is not None:
        labels = np.asarray(groups)
        members = [np.flatnonzero(labels == label) for label in dict.fromkeys(groups)]
    return _resampled(x, y, members, groups is not None, replicates, np.random.default_rng(seed))


def _estimated(x: Floats, y: Floats, sampled: Floats) -> tuple[Correlation, Correlation]:
    from scipy import stats

    linear, ranked = stats.pearsonr(x, y), stats.spearmanr(x, y)
    # The t distribution of scipy's p-value is for many points; of few it makes 0 where 1 in n!/2 is true.
    p_value = _exact_rank_p(x, y) if len(x) <= _EXACT else max(ranked.pvalue, 2 / math.factorial(len(x)))
    return (
        Correlation(float(linear.statistic), float(linear.pvalue), *_bounds(sampled[:, 0])),
        Correlation(float(ranked.statistic), float(p_value), *_bounds(sampled[:, 1])),
    )


def _exact_rank_p(x: Floats, y: Floats) -> float:
    """The share of all pairings of x with y whose rank correlation is at least as strong, of either sign."""
    from scipy import stats

    ranks_x, ranks_y = (stats.rankdata(values) for values in (x, y))
    centred = ranks_y - ranks_y.mean()
    pairings = np.array(list(itertools.permutations(ranks_x - ranks_x.mean())))
    strength = np.abs(pairings @ centred)
    return float((strength >= strength[0] - 1e-9).mean())


def _bounds(sampled: Floats) -> tuple[float | None, float | None, str]:
    defined = sampled[~np.isnan(sampled)]
    if 2 * len(defined) <= len(sampled):
        return None, None, "no interval: most bootstrap samples have no correlation"
    low, high = np.quantile(defined, ((1 - _LEVEL) / 2, (1 + _LEVEL) / 2))
    return float(low), float(high), ""


def _resampled(
    x: Floats,
    y: Floats,
    members: Sequence[NDArray[np.intp]],
    by_group: bool,
    replicates: int,
    generator: np.random.Generator,
) -> Floats:
    """Return the Pearson and Spearman correlation of each bootstrap sample, (replicates, 2); NaN where undefined.

    A sample is kept as how often each point was drawn: the correlations are weighted ones then, and those of all
    samples come from a few matrix operations.
    """
    sampled = np.empty((replicates, 2))
    step = max(1, _CHUNK // len(x))
    for start in range(0, replicates, step):
        rows = min(step, replicates - start)
        times = np.zeros((rows, len(x)))
        drawn = np.ones((rows, 1), dtype=np.int64)
        if by_group:
            drawn = generator.multinomial(len(members), np.full(len(members), 1 / len(members)), size=rows)
        for place, points in enumerate(members):
            # A group drawn t times gives t·n draws of its n points, and a sum of multinomials is one again.
            times[:, points] = generator.multinomial(
                drawn[:, place] * len(points), np.full(len(points), 1 / len(points))
            )
        ranks_x, values_x = _ranks(x, times)
        ranks_y, values_y = _ranks(y, times)
        one_value = (values_x < 2) | (values_y < 2)
        for column, pair in enumerate(((x, y), (ranks_x, ranks_y))):
            sampled[start : start + rows, column] = np.where(one_value, np.nan, _weighted(*pair, times))
    return sampled


def _weighted(x: Floats, y: Floats, times: Floats) -> Floats:
    """Pearson's r of points that count `times` (samples, points); x and y are (points,) or (samples, points)."""
    total = times.sum(axis=1, keepdims=True)
    x = x - (times * x).sum(axis=1, keepdims=True) / total
    y = y - (times * y).sum(axis=1, keepdims=True) / total
    covariance = (times * x * y).sum(axis=1)
    spread = np.sqrt((times * x**2).sum(axis=1)) * np.sqrt((times * y**2).sum(axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.clip(covariance / spread, -1.0, 1.0)


def _ranks(values: Floats, times: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """Return the mid-ranks of the points in each sample (samples, points), and how many values each sample has."""
    distinct, place = np.unique(values, return_inverse=True)
    counts = np.zeros((len(times), len(distinct)))
    np.add.at(counts.T, place, times.T)
    ranks = np.cumsum(counts, axis=1) - (counts - 1) / 2
    return ranks[:, place], (counts > 0).sum(axis=1)
