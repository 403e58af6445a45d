"""Correlation of drops with singular values: Pearson and Spearman, with p-values and bootstrap intervals."""

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
_MAX_EXACT = 8  # points up to which all pairings are tried
REPLICATES = 10_000


def correlate(x: ArrayLike, y: ArrayLike, seed: int = 0) -> dict[str, Any]:
    """Return the correlations of y with x, each (points,): `points`, and `pearson` and `spearman`.

    A coefficient has `estimate`, two-sided `p_value` (Spearman's of up to 8 points is exact), and `low` and `high` of
    its 95 % percentile interval over 10,000 bootstrap samples; all None if it is not defined, and `reason` says why.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if reason := _undefined(x, y):
        return {"points": len(x), **{name: _coefficient(reason=reason) for name in COEFFICIENTS}}
    sampled = _sampled(x, y, seed)
    linear, ranked = stats.pearsonr(x, y), stats.spearmanr(x, y)
    # The t distribution of scipy's p-value is for many points; for few it gives 0 where 2/n! is exact.
    p_value = _exact_rank_p(x, y) if len(x) <= _MAX_EXACT else max(ranked.pvalue, 2 / math.factorial(len(x)))
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
    results = []
    for kind, metric in itertools.product(dict.fromkeys(row["kind"] for row in rows), rows[0]["drop"]):
        for name in ("all", *(types if len(types) > 1 else ())):
            drops = _mean_drops([row for row in rows if name in ("all", row["type"])], kind, metric)
            finite = drops.dropna()
            labels = {"kind": kind, "metric": metric, "type": name, "left_out": len(drops) - len(finite)}
            results.append(labels | correlate(finite.index.get_level_values("sigma"), finite, seed))
    return results


def contrasts(rows: Rows, seed: int = 0) -> list[dict[str, Any]]:
    """Return, for each `metric` and each two interventions, their correlations' difference, `kind` less `minus`.

    Coefficients are as from `correlate`, without p-values, over the directions whose drop is finite under both; both
    interventions share the bootstrap samples.
    """
    results = []
    pairs = list(itertools.combinations(dict.fromkeys(row["kind"] for row in rows), 2))
    for metric, (kind, minus) in itertools.product(rows[0]["drop"], pairs):
        both = pd.concat([_mean_drops(rows, name, metric) for name in (kind, minus)], axis=1).dropna()
        x, (first, second) = both.index.get_level_values("sigma"), both.to_numpy(dtype=np.float64).T
        one, other = correlate(x, first, seed), correlate(x, second, seed)
        row = {"kind": kind, "minus": minus, "metric": metric, "points": len(both)}
        reason = one["pearson"]["reason"] or other["pearson"]["reason"]
        differences = None if reason else _sampled(x, first, seed) - _sampled(x, second, seed)
        for column, name in enumerate(COEFFICIENTS):
            row[name] = _coefficient(reason=reason)
            if differences is not None:
                estimate = one[name]["estimate"] - other[name]["estimate"]
                row[name] = _coefficient(estimate, None, differences[:, column])
        results.append(row)
    return results


def _mean_drops(rows: Rows, kind: str, metric: str) -> pd.Series:
    """Return the mean drop of each direction (module, index, σ); NaN if a drop is not finite."""
    direction = ["module", "index", "sigma"]
    values = [[*(row[name] for name in direction), row["drop"][metric]] for row in rows if row["kind"] == kind]
    drops = pd.DataFrame(values, columns=[*direction, "drop"]).astype({"drop": float})
    return drops.groupby(direction, sort=False)["drop"].agg(lambda draws: draws.mean(skipna=False))


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
    """Return the share of all pairings of x with y whose rank correlation is at least as strong, of either sign."""
    ranks_x, ranks_y = (stats.rankdata(values) for values in (x, y))
    pairings = np.array(list(itertools.permutations(ranks_x - ranks_x.mean())))
    strength = np.abs(pairings @ (ranks_y - ranks_y.mean()))
    return float((strength >= strength[0] - 1e-9).mean())


def _sampled(x: ArrayLike, y: ArrayLike, seed: int) -> Floats:
    """Return both correlations of bootstrap samples, (REPLICATES, 2), NaN where undefined; drawn by the seed alone."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    parts = []
    for counts in resample_counts(len(x), REPLICATES, np.random.default_rng(seed)):
        indices = np.repeat(np.tile(np.arange(len(x)), len(counts)), counts.ravel()).reshape(counts.shape)
        pairs = [(x[indices], y[indices]), [stats.rankdata(values[indices], axis=1) for values in (x, y)]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.ConstantInputWarning)
            parts.append(np.stack([stats.pearsonr(*pair, axis=1).statistic for pair in pairs], axis=1))
    return np.concatenate(parts)
