import itertools
import math
import re

import numpy as np
import pytest
from scipy import stats

from hiplora.errors import ConfigError, DataError
from hiplora.probing import ProbeRecord, contrasts, correlate, findings
from hiplora.probing import correlation as inside


def cloud(points=30, slope=1.0, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.exponential(size=points)
    return x, slope * x + generator.normal(size=points)


def record(index, sigma, drop, kind="zero", module="model.layers.0.self_attn.q_proj", draw=0):
    type_ = module.rpartition(".")[2]
    return ProbeRecord(module, 0, type_, index, 9, sigma, sigma / 9, kind, draw, -1.0, {"score": drop})


def test_estimates_and_p_values_are_scipys():
    x, y = cloud()
    found = correlate(x, y, replicates=100)
    assert found.points == 30
    for name, expected in (("pearson", stats.pearsonr(x, y)), ("spearman", stats.spearmanr(x, y))):
        assert getattr(found, name).estimate == pytest.approx(expected.statistic)
        assert getattr(found, name).p_value == pytest.approx(expected.pvalue)


@pytest.mark.parametrize("points", [4, 6])
def test_the_rank_p_value_of_few_points_is_that_of_all_pairings_ties_included(points):
    x, y = (values.round(0) for values in cloud(points, seed=5))
    y[0] += 0.5

    def strength(x):
        return abs(stats.spearmanr(x, y).statistic)

    expected = stats.permutation_test(
        (x,), strength, permutation_type="pairings", n_resamples=np.inf, alternative="greater"
    ).pvalue
    assert correlate(x, y, replicates=10).spearman.p_value == pytest.approx(expected)


@pytest.mark.parametrize("points", [4, 8, 9, 12])
def test_a_perfect_order_has_the_p_value_of_one_pairing_and_its_reverse(points):
    x = np.arange(float(points))
    found = correlate(x, np.exp(x), replicates=10).spearman
    assert found.estimate == pytest.approx(1)
    assert found.p_value == pytest.approx(2 / math.factorial(points))


@pytest.mark.parametrize("groups", [None, ["a"] * 10 + ["b"] * 5 + ["c"] * 5])
def test_the_correlations_of_bootstrap_samples_are_scipys_ties_included(groups):
    x, y = cloud(20)
    x, y = x.round(1), y.round(0)
    labels = np.asarray(groups or ["all"] * 20)
    members = [np.flatnonzero(labels == name) for name in dict.fromkeys(labels)]
    sampled = inside._resampled(x, y, members, groups is not None, 50, np.random.default_rng(3))
    assert sampled.shape == (50, 2)

    generator = np.random.default_rng(3)
    drawn = np.ones((50, 1), dtype=int)
    if groups:
        drawn = generator.multinomial(3, np.full(3, 1 / 3), size=50)
    times = np.zeros((50, 20), dtype=int)
    for place, points in enumerate(members):
        share = np.full(len(points), 1 / len(points))
        times[:, points] = generator.multinomial(drawn[:, place] * len(points), share)
    for row, counts in zip(sampled, times, strict=True):
        chosen = np.repeat(np.arange(20), counts)
        assert row[0] == pytest.approx(stats.pearsonr(x[chosen], y[chosen]).statistic)
        assert row[1] == pytest.approx(stats.spearmanr(x[chosen], y[chosen]).statistic)


def test_the_interval_agrees_with_scipys_percentile_bootstrap():
    x, y = cloud(40)
    own = correlate(x, y, replicates=10_000, seed=1).pearson
    other = stats.bootstrap(
        (x, y),
        lambda x, y: stats.pearsonr(x, y).statistic,
        paired=True,
        vectorized=False,
        method="percentile",
        n_resamples=4000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert own.low == pytest.approx(other.low, abs=0.03)
    assert own.high == pytest.approx(other.high, abs=0.03)
    assert own.low < own.estimate < own.high


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    truth = 1 / np.sqrt(2)  # of x and x + noise, both of variance 1
    hits = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        x = generator.normal(size=60)
        found = correlate(x, x + generator.normal(size=60), replicates=400, seed=seed).pearson
        hits += found.low <= truth <= found.high
    assert 0.88 <= hits / 200 <= 0.99


def test_an_interval_over_groups_is_wider_where_groups_differ():
    generator = np.random.default_rng(0)
    groups = [name for name in "abcdefgh" for _ in range(20)]
    shift = np.repeat(generator.normal(size=(2, 8)) * 3, 20, axis=1)
    x, y = shift + generator.normal(size=(2, 160))
    plain, grouped = (correlate(x, y, names, replicates=2000).pearson for names in (None, groups))
    assert grouped.estimate == plain.estimate
    assert grouped.high - grouped.low > 2 * (plain.high - plain.low)


def test_the_same_seed_gives_the_same_interval():
    x, y = cloud()
    assert correlate(x, y, replicates=500, seed=4) == correlate(x, y, replicates=500, seed=4)
    assert correlate(x, y, replicates=500, seed=4) != correlate(x, y, replicates=500, seed=5)


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        ([1, 2, 3], [5, 5, 5], r"all drops are equal \(5\)"),
        ([2, 2, 2], [1, 2, 3], r"all singular values are equal \(2\)"),
        ([1, 2], [1, 2], "2 directions; a correlation takes at least 3"),
        ([], [], "0 directions"),
    ],
)
def test_a_correlation_that_is_not_defined_is_none_with_a_reason(x, y, said):
    found = correlate(x, y)
    for one in (found.pearson, found.spearman):
        assert (one.estimate, one.p_value, one.low, one.high) == (None, None, None, None)
        assert re.match(said, one.reason)


def test_nearly_constant_drops_have_an_estimate_and_samples_of_one_value_are_passed_over():
    found = correlate([1, 2, 3, 4], [0, 0, 0, 1], replicates=2000)
    assert found.pearson.estimate > 0
    assert found.pearson.low is not None
    assert np.isfinite([found.pearson.low, found.pearson.high]).all()


def test_where_most_samples_have_one_value_there_is_no_interval():
    found = correlate([1, 1, 1, 2, 1], [1, 1, 1, 1, 2], replicates=2000)
    assert found.pearson.estimate == pytest.approx(-0.25)
    assert (found.pearson.low, found.pearson.high) == (None, None)
    assert "most bootstrap samples" in found.pearson.reason


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (([1, 2, 3], [1, 2]), DataError, "3 x, 2 y; expected as many"),
        (([1, 2, 3], [1, 2, 3], ["a"]), DataError, "1 groups"),
        (([1, 2, float("nan")], [1, 2, 3]), DataError, r"x\[2\] is nan"),
        (([[1, 2]], [1, 2]), DataError, "expected a list of numbers"),
    ],
)
def test_what_cannot_be_correlated_is_refused(arguments, error, said):
    with pytest.raises(error, match=said):
        correlate(*arguments)


def test_replicates_below_one_are_refused():
    with pytest.raises(ConfigError, match="replicates is 0"):
        correlate([1, 2, 3], [1, 2, 3], replicates=0)


def test_findings_are_over_all_modules_and_by_type_for_each_intervention():
    rows = [
        record(index, float(sigma), sign * sigma, kind, f"model.layers.{layer}.self_attn.{name}")
        for kind, (name, sign), layer in itertools.product(
            ("zero", "flip"), (("q_proj", 1), ("v_proj", -1)), (0, 1)
        )
        for index, sigma in enumerate((4, 3, 1))
    ]
    found = findings(rows, replicates=50)
    assert [(one.kind, one.metric, one.type) for one in found] == [
        (kind, "score", name) for kind in ("zero", "flip") for name in ("all", "q_proj", "v_proj")
    ]
    everything, queries, values = found[:3]
    assert (everything.association.points, queries.association.points) == (12, 6)
    assert queries.association.pearson.estimate == pytest.approx(1)
    assert values.association.spearman.estimate == pytest.approx(-1)
    assert found[0].as_dict()["pearson"]["estimate"] == everything.association.pearson.estimate


def test_draws_of_one_direction_are_one_point():
    rows = [record(i, float(i), value, "noise_0.1", draw=draw)
            for i, pair in enumerate([(0, 2), (5, 1), (2, 2)]) for draw, value in enumerate(pair)]  # fmt: skip
    (found,) = findings(rows, replicates=50)
    assert found.association.points == 3
    assert found.association.pearson.estimate == pytest.approx(stats.pearsonr([0, 1, 2], [1, 3, 2]).statistic)


def test_directions_without_a_finite_drop_are_left_out_and_counted():
    rows = [record(i, float(i), drop) for i, drop in enumerate([1.0, None, 2.0, 5.0])]
    (found,) = findings(rows, replicates=50)
    assert (found.left_out, found.association.points) == (1, 3)


def test_resampling_by_module_is_asked_for_by_name():
    rows = [record(i, float(i), drop) for i, drop in enumerate([1.0, 3.0, 2.0, 5.0])]
    assert findings(rows, "modules", replicates=50)[0].association.points == 4
    with pytest.raises(ConfigError, match="resample is 'layers'; expected one of directions, modules"):
        findings(rows, "layers")


def two_kinds(points=40, noise=0.5, seed=1):
    """Records whose drops go with σ under zero, and under flip too but for noise."""
    generator = np.random.default_rng(seed)
    sigma = generator.exponential(size=points)
    drops = {"zero": 2 * sigma, "flip": 2 * sigma + noise * generator.normal(size=points)}
    return [record(i, sigma[i], float(drops[kind][i]), kind) for kind in drops for i in range(points)]


def test_contrasts_are_differences_of_correlations_over_the_same_directions():
    rows = two_kinds()
    (found,) = contrasts(rows, replicates=500)
    zero, flip = (one.association for one in findings(rows, replicates=500))
    assert (found.kind, found.minus, found.metric, found.points) == ("zero", "flip", "score", 40)
    for name in ("pearson", "spearman"):
        apart = getattr(found, name)
        assert apart.estimate == pytest.approx(getattr(zero, name).estimate - getattr(flip, name).estimate)
        assert (apart.low < apart.estimate < apart.high, apart.p_value) == (True, None)


def test_a_contrast_is_paired_so_that_equal_drops_are_told_apart_by_nothing():
    (found,) = contrasts(two_kinds(noise=0), replicates=200)
    assert (found.pearson.estimate, found.pearson.low, found.pearson.high) == (0, 0, 0)


def test_a_contrast_is_over_the_directions_that_are_finite_under_both():
    rows = two_kinds(points=6)
    rows[1] = record(1, rows[1].sigma, None, "zero")
    rows[8] = record(2, rows[8].sigma, None, "flip")
    (found,) = contrasts(rows, replicates=200)
    kept = [0, 3, 4, 5]
    sigma = [rows[i].sigma for i in kept]
    zero, flip = ([rows[start + i].drop["score"] for i in kept] for start in (0, 6))
    expected = stats.pearsonr(sigma, zero).statistic - stats.pearsonr(sigma, flip).statistic
    assert (found.points, found.pearson.estimate) == (4, pytest.approx(expected))


def test_contrasts_of_too_few_directions_have_a_reason_and_an_unknown_way_to_draw_is_refused():
    (found,) = contrasts(two_kinds(points=2))
    assert (found.pearson.estimate, found.points) == (None, 2)
    assert "2 directions" in found.spearman.reason
    with pytest.raises(ConfigError, match="resample is 'layers'"):
        contrasts(two_kinds(), "layers")
