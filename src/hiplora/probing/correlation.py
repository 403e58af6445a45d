"""Does a drop go with the singular value? Pearson and Spearman correlations with p-values and bootstrap intervals."""

import itertools
import math
import warnings
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

    A coefficient has `estimate`, two-sided `p_value` (Spearman's of up to 8 points is exact), and `low` and `high` of
    its 95 % percentile interval over 10,000 bootstrap samples; all None if it is not defined, and `reason` says why.
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
    """Return `correlate` of σ and every metric's drop, by `kind` of intervention, over all modules and by `type`.

    `rows` as from `probe`. A point is a direction, draws of noise are averaged; `left_out` counts directions whose drop
    is not finite.
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
    """Return, for each `metric` and each two interventions, their correlations' difference, `kind` less `minus`.

    As of `correlate`, without p-values, over the directions whose drop is finite under both, which samples share.
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
            row[name] = _coefficient(reason=reason)
            if apart is not None:
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
    values = {"estimate": estimate, "p_value": p_value, "low": None, "high": None}
    if sampled is not None and np.isnan(sampled).mean() < 0.5:
        values["low"], values["high"] = np.nanquantile(sampled, (0.025, 0.975))
    elif sampled is not None:
        reason = "no interval: most bootstrap samples have no correlation"
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
        pairs = [(x[drawn], y[drawn]), [stats.rankdata(values[drawn], axis=1) for values in (x, y)]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.ConstantInputWarning)
            parts.append(np.stack([stats.pearsonr(*pair, axis=1).statistic for pair in pairs], axis=1))
    return np.concatenate(parts)
