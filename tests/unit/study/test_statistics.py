"""Estimates with intervals from scores item by item."""

import math

import numpy as np
import pytest

from hiplora.study.statistics import (
    Estimate,
    Resampler,
    estimate,
    geometric,
    hierarchical,
    over_seeds,
    ratio,
    spread,
)

ITEMS = np.random.default_rng(0).normal(50, 10, 200).tolist()


def test_the_first_draw_is_the_mean_itself():
    draws = Resampler().mean("task", ITEMS)
    assert draws[0] == pytest.approx(np.mean(ITEMS))
    assert len(draws) == 10_001


def test_an_interval_is_that_of_the_mean():
    found = estimate(Resampler().mean("task", ITEMS))
    expected = 1.96 * np.std(ITEMS) / np.sqrt(len(ITEMS))
    assert found.half == pytest.approx(expected, rel=0.05)
    assert found.low < found.value < found.high


def test_what_is_scored_on_the_same_items_stays_paired():
    draws = Resampler()
    better = [value + 1 for value in ITEMS]
    difference = estimate(draws.mean("task", better) - draws.mean("task", ITEMS))
    assert difference.value == pytest.approx(1)
    assert difference.half == pytest.approx(0, abs=1e-3)
    apart = estimate(draws.mean("other", better) - draws.mean("task", ITEMS))
    assert apart.half > 1


def test_the_same_seed_gives_the_same_draws():
    assert np.array_equal(Resampler(3).mean("a", ITEMS), Resampler(3).mean("a", ITEMS))
    assert not np.array_equal(Resampler(3).mean("a", ITEMS), Resampler(4).mean("a", ITEMS))


def test_items_are_averaged_over_seeds():
    assert over_seeds([[0, 100], [100, 100]]) == [50, 100]


def test_the_spread_needs_two_seeds():
    assert spread([1.0]) is None
    assert spread([1.0, 3.0]) == pytest.approx(np.sqrt(2))


def test_the_papers_interval_draws_seeds_too():
    seeds = [[10.0] * 50, [20.0] * 50, [30.0] * 50]
    found = hierarchical({"method": seeds})["method"]
    assert found.value == pytest.approx(20)
    assert (found.low, found.high) == (pytest.approx(40 / 3, abs=4), pytest.approx(80 / 3, abs=4))
    assert hierarchical({}) == {}


def test_ratios_have_a_geometric_mean_and_the_interval_of_their_logarithms():
    found = geometric([2.0, 8.0])
    assert found.value == pytest.approx(4)
    assert found.low * found.high == pytest.approx(16)
    # two values: t with one degree of freedom, 12.706 · sd / √2 of the logarithms
    assert np.log(found.high / 4) == pytest.approx(12.706 * np.log(4) / np.sqrt(2) / np.sqrt(2), rel=1e-3)
    assert geometric([3.0]).low is None


def test_a_ratio_over_what_is_positive_throughout_has_the_quantiles_of_the_ratio():
    here, there = np.array([2.0, 1.0, 3.0]), np.array([4.0, 4.0, 4.0])
    assert ratio(here, there) == estimate(here / there)
    assert ratio(here, np.array([0.0, 4.0, 4.0])) == Estimate(math.inf)


def test_a_ratio_over_what_is_seldom_none_is_bounded_and_agrees_with_the_contrast():
    """Fieller: r is allowed where here − r·there is none within its own interval."""
    generator = np.random.default_rng(0)
    here, there = generator.normal(1, 0.3, 20_001), generator.normal(4, 1.5, 20_001)
    here[0], there[0] = 1, 4
    assert (there <= 0).any()
    found = ratio(here, there)
    assert found.low < found.value == 0.25 < found.high
    for bound in (found.low, found.high):
        low, high = np.quantile((here - bound * there)[1:], (0.025, 0.975))
        assert min(abs(low), abs(high)) < 0.01


def test_a_ratio_over_what_is_often_none_has_an_open_side():
    generator = np.random.default_rng(0)
    here, there = generator.normal(3, 0.3, 20_001), generator.normal(1, 1, 20_001)
    here[0], there[0] = 3, 1
    found = ratio(here, there)
    assert found.low < 3
    assert found.high is None
