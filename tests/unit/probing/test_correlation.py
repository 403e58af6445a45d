"""Correlations of drops with σ: scipy's estimates, bootstrap intervals, contrasts over the same directions."""

import math

import numpy as np
import pytest
from scipy import stats

from hiplora.probing import contrasts, correlate, findings

BOTH = ("pearson", "spearman")


def cloud(points=30, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.exponential(size=points)
    return x, x + generator.normal(size=points)


def row(index, sigma, drop, kind="zero", module="model.layers.0.self_attn.q_proj", draw=0):
    named = {"module": module, "type": module.rpartition(".")[2], "index": index, "sigma": sigma}
    return {**named, "kind": kind, "draw": draw, "drop": {"score": drop}}


@pytest.mark.parametrize("name", BOTH)
def test_estimates_and_p_values_are_scipys_and_intervals_agree_with_its_bootstrap_ties_included(name):
    x, y = cloud(40)
    x, y = x.round(1), y.round(0)
    own, scipys = correlate(x, y, seed=1)[name], getattr(stats, f"{name}r")
    expected = scipys(x, y)
    assert (own["estimate"], own["p_value"]) == pytest.approx((expected.statistic, expected.pvalue))
    how = {"paired": True, "vectorized": False, "method": "percentile", "n_resamples": 2000}
    drawn = stats.bootstrap((x, y), lambda x, y: scipys(x, y).statistic, **how, rng=np.random.default_rng(0))
    other = drawn.confidence_interval
    assert (own["low"], own["high"]) == pytest.approx((other.low, other.high), abs=0.04)
    assert own["low"] < own["estimate"] < own["high"]
    assert correlate(x, y, seed=1)[name] == own != correlate(x, y, seed=2)[name]


def test_the_rank_p_value_of_few_points_is_that_of_all_pairings_ties_included():
    x, y = (values.round(0) for values in cloud(6, seed=5))
    y[0] += 0.5
    all_pairings = {"permutation_type": "pairings", "n_resamples": np.inf, "alternative": "greater"}
    expected = stats.permutation_test((x,), lambda x: abs(stats.spearmanr(x, y).statistic), **all_pairings)
    assert correlate(x, y)["spearman"]["p_value"] == pytest.approx(expected.pvalue)
    for points in (8, 9):  # a perfect order: one pairing and its reverse
        x = np.arange(float(points))
        assert correlate(x, np.exp(x))["spearman"]["p_value"] == pytest.approx(2 / math.factorial(points))


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        ([1, 2, 3], [5, 5, 5], "all drops are equal (5)"),
        ([2, 2, 2], [1, 2, 3], "all singular values are equal (2)"),
        ([1, 2], [1, 2], "2 directions; a correlation takes at least 3"),
    ],
)
def test_a_correlation_that_is_not_defined_is_none_with_a_reason(x, y, said):
    for name in BOTH:
        assert correlate(x, y)[name] == {**dict.fromkeys(("estimate", "p_value", "low", "high")), "reason": said}


def test_samples_of_one_value_are_passed_over_and_give_no_interval_if_they_are_most():
    correlation = correlate([1, 2, 3, 4], [0, 0, 0, 1])["pearson"]
    assert correlation["estimate"] > 0
    assert np.isfinite([correlation["low"], correlation["high"]]).all()
    correlation = correlate([1, 1, 1, 2, 1], [1, 1, 1, 1, 2])["pearson"]
    assert correlation["estimate"] == pytest.approx(-0.25)
    assert (correlation["low"], correlation["high"]) == (None, None)
    assert "most bootstrap samples" in correlation["reason"]


def test_draws_of_one_direction_are_one_point_and_those_without_a_finite_drop_are_counted():
    pairs = [(0, 2), (5, 1), (2, 2), (1, None)]
    rows = [row(i, float(i), pairs[i][draw], "noise_0.1", draw=draw) for i in range(4) for draw in range(2)]
    (finding,) = findings(rows)
    assert (finding["points"], finding["left_out"]) == (3, 1)
    assert finding["pearson"]["estimate"] == pytest.approx(stats.pearsonr([0, 1, 2], [1, 3, 2]).statistic)


def two_kinds(points=40, noise=0.5, seed=1):
    """Rows whose drops go with σ under zero, and under flip too but for noise."""
    generator = np.random.default_rng(seed)
    sigma = generator.exponential(size=points)
    drops = {"zero": 2 * sigma, "flip": 2 * sigma + noise * generator.normal(size=points)}
    return [row(i, sigma[i], float(drops[kind][i]), kind) for kind in drops for i in range(points)]


def test_contrasts_are_paired_differences_of_correlations_over_the_directions_that_are_finite_under_both():
    rows = two_kinds()
    rows[1]["drop"]["score"] = rows[42]["drop"]["score"] = None
    (pair,) = contrasts(rows)
    finite = [i for i in range(40) if i not in (1, 2)]
    sigma = [rows[i]["sigma"] for i in finite]
    zero, flip = ([rows[start + i]["drop"]["score"] for i in finite] for start in (0, 40))
    assert (pair["kind"], pair["minus"], pair["metric"], pair["points"]) == ("zero", "flip", "score", 38)
    for name in BOTH:
        apart, scipys = pair[name], getattr(stats, f"{name}r")
        expected = scipys(sigma, zero).statistic - scipys(sigma, flip).statistic
        assert apart["estimate"] == pytest.approx(expected)
        assert apart["low"] < apart["estimate"] < apart["high"]
        assert apart["p_value"] is None
    (same,) = contrasts(two_kinds(noise=0))
    assert (same["pearson"]["estimate"], same["pearson"]["low"], same["pearson"]["high"]) == (0, 0, 0)
    (few,) = contrasts(two_kinds(points=2))
    assert (few["pearson"]["estimate"], few["points"]) == (None, 2)
