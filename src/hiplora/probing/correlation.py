"""Does a drop go with the singular value? Pearson and Spearman correlations with p-values and bootstrap intervals."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from hiplora.metrics import resample_counts

Floats = NDArray[np.float64]
Rows = Sequence[Mapping[str, Any]]

COEFFICIENTS = ("pearson", "spearman")
LEAST = 3  # points; of two, every correlation is perfect
_EXACT = 8  # points up to which all pairings are tried
REPLICATES = 10_000


def correlate(x: ArrayLike, y: ArrayLike, seed: int = 0) -> dict[str, Any]:
    """Return how y goes with x, each (points,): `points`, and `pearson` and `spearman`.

    A coefficient has `estimate`, two-sided `p_value`, and `low` and `high` of its 95 % percentile interval over 10,000
    bootstrap samples of the points; all are None if it is not defined, and `reason` says why. Estimates and p-values
    are scipy's; of up to 8 points Spearman's p-value is exact.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if reason := _undefined(x, y):
        return {"points": len(x), **{name: _coefficient(reason=reason) for name in COEFFICIENTS}}
    sampled = _sampled(x, y, seed)
    linear, ranked = stats.pearsonr(x, y), stats.spearmanr(x, y)
    # The t distribution of scipy's p-value is for many points; of few it makes 0 where 1 in n!/2 is true.
    p_value = _exact_rank_p(x, y) if len(x) <= _EXACT else max(ranked.pvalue, 2 / math.factorial(len(x)))
    return {
        "points": len(x),
        "pearson": _coefficient(linear.statistic, linear.pvalue, sampled[:, 0]),
        "spearman": _coefficient(ranked.statistic, p_value, sampled[:, 1]),
    }


def findings(rows: Rows, seed: int = 0) -> list[dict[str, Any]]:
    """Return the correlation of σ with every metric's drop, for each `kind` of intervention, in all and by type.

    `rows` as from `probe`. A point is a direction, the drops under several draws of noise are averaged; `type` is a
    type of module or "all", `left_out` counts directions whose drop is not finite; the rest as `correlate`.
    """
    types = list(dict.fromkeys(row["type"] for row in rows))
    found = []
    for kind, metric in itertools.product(dict.fromkeys(row["kind"] for row in rows), rows[0]["drop"]):
        for name in ("all", *(types if len(types) > 1 else ())):
            points = _points([row for row in rows if name in ("all", row["type"])], kind, metric)
            known = points.dropna()
            named = {"kind": kind, "metric": metric, "type": name, "left_out": len(points) - len(known)}
            found.append(named | correlate(known.index.get_level_values("sigma"), known, seed))
    return found


def contrasts(rows: Rows, seed: int = 0) -> list[dict[str, Any]]:
    """Return, for each `metric` and each two interventions, how far apart their correlations with σ are.

    `kind` less `minus`, over the directions whose drop is finite under both, which each bootstrap sample shares;
    `points`, `pearson` and `spearman` as of `correlate`, without p-values.
    """
    found = []
    pairs = list(itertools.combinations(dict.fromkeys(row["kind"] for row in rows), 2))
    for metric, (kind, minus) in itertools.product(rows[0]["drop"], pairs):
        both = pd.concat([_points(rows, name, metric) for name in (kind, minus)], axis=1).dropna()
        x, (ours, theirs) = both.index.get_level_values("sigma"), both.to_numpy(dtype=np.float64).T
        one, other = correlate(x, ours, seed), correlate(x, theirs, seed)
        row = {"kind": kind, "minus": minus, "metric": metric, "points": len(both)}
        reason = one["pearson"]["reason"] or other["pearson"]["reason"]
        apart = None if reason else _sampled(x, ours, seed) - _sampled(x, theirs, seed)
        for place, name in enumerate(COEFFICIENTS):
            if apart is None:
                row[name] = _coefficient(reason=reason)
            else:
                row[name] = _coefficient(one[name]["estimate"] - other[name]["estimate"], None, apart[:, place])
        found.append(row)
    return found


def _points(rows: Rows, kind: str, metric: str) -> pd.Series:
    """The mean drop of each direction (module, index, σ); NaN if a drop is not finite."""
    direction = ["module", "index", "sigma"]
    some = [[*(row[name] for name in direction), row["drop"][metric]] for row in rows if row["kind"] == kind]
    drops = pd.DataFrame(some, columns=[*direction, "drop"]).astype({"drop": float})
    return drops.groupby(direction, sort=False)["drop"].agg(lambda drawn: drawn.mean(skipna=False))


def _undefined(x: Floats, y: Floats) -> str:
    if len(x) < LEAST:
        return f"{len(x)} directions; a correlation takes at least {LEAST}"
    for values, what in ((x, "singular values"), (y, "drops")):
        if np.ptp(values) == 0:
            return f"all {what} are equal ({values[0]:g})"
    return ""


def _coefficient(
    estimate: float | None = None, p_value: float | None = None, sampled: Floats | None = None, reason: str = ""
) -> dict[str, Any]:
    bounds: tuple[float | None, ...] = (None, None)
    if sampled is not None:
        if np.isnan(sampled).mean() < 0.5:
            bounds = tuple(np.nanquantile(sampled, (0.025, 0.975)))
        else:
            reason = "no interval: most bootstrap samples have no correlation"
    values = dict(zip(("estimate", "p_value", "low", "high"), (estimate, p_value, *bounds), strict=True))
    return {**{name: None if value is None else float(value) for name, value in values.items()}, "reason": reason}


def _exact_rank_p(x: Floats, y: Floats) -> float:
    """The share of all pairings of x with y whose rank correlation is at least as strong, of either sign."""
    ranks_x, ranks_y = (stats.rankdata(values) for values in (x, y))
    pairings = np.array(list(itertools.permutations(ranks_x - ranks_x.mean())))
    strength = np.abs(pairings @ (ranks_y - ranks_y.mean()))
    return float((strength >= strength[0] - 1e-9).mean())


def _sampled(x: ArrayLike, y: ArrayLike, seed: int) -> Floats:
    """Both correlations of bootstrap samples, (REPLICATES, 2), NaN where undefined; draws depend on the seed alone."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    parts = []
    for counts in resample_counts(len(x), REPLICATES, np.random.default_rng(seed)):
        drawn = np.repeat(np.tile(np.arange(len(x)), len(counts)), counts.ravel()).reshape(counts.shape)
        ranks = (stats.rankdata(values[drawn], axis=1) for values in (x, y))
        parts.append(np.stack([_pearson(x[drawn], y[drawn]), _pearson(*ranks)], axis=1))
    return np.concatenate(parts)


def _pearson(x: Floats, y: Floats) -> Floats:
    """Pearson's r of each row of x and y, (samples, points); NaN where one of them has one value throughout."""
    constant = (np.ptp(x, axis=1) == 0) | (np.ptp(y, axis=1) == 0)
    x, y = (values - values.mean(axis=1, keepdims=True) for values in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        r = (x * y).sum(axis=1) / np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
    return np.where(constant, np.nan, np.clip(r, -1.0, 1.0))
