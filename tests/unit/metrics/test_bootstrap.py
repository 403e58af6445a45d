"""The intervals: by a slow reference, by their invariances, and by how often they hold the truth."""

import numpy as np
import pytest
from hypothesis import settings

from hiplora.errors import ConfigError, DataError
from hiplora.metrics import (
    Interval,
    paired_bootstrap,
    sign_flip_p_value,
    student_margin,
)
from hiplora.metrics.bootstrap import percentile_interval, resampled_means

few = settings(max_examples=25, deadline=None, derandomize=True, database=None)

RAGGED = {
    "lora": [[10.0, 20.0, 30.0], [40.0], [0.0, 100.0]],
    "hiplora": [[12.0, 26.0, 31.0], [45.0], [10.0, 90.0]],
}


def normal(seeds, instances, methods=("a", "b"), seed=0):
    generator = np.random.default_rng(seed)
    return {method: generator.normal(50, 10, (seeds, instances)) for method in methods}


def replicates_by_hand(values, count, generator):
    """Means of all methods in each replicate, by loops: seeds, then instances in each, the same for all methods."""
    found = []
    for _ in range(count):
        means = {method: [] for method in values}
        seeds = len(next(iter(values.values())))
        for seed in generator.integers(seeds, size=seeds):
            size = len(next(iter(values.values()))[seed])
            chosen = generator.integers(size, size=size)
            for method, rows in values.items():
                means[method].append(np.mean([rows[seed][i] for i in chosen]))
        found.append([np.mean(row) for row in means.values()])
    return np.array(found)


def test_the_estimate_is_the_mean_over_seeds_of_the_mean_over_instances():
    result = paired_bootstrap(RAGGED, replicates=50)
    assert result.mean["lora"].estimate == pytest.approx((20 + 40 + 50) / 3)
    assert result.mean["hiplora"].estimate == pytest.approx((23 + 45 + 50) / 3)
    assert result.difference["hiplora", "lora"].estimate == pytest.approx((3 + 5 + 0) / 3)


@pytest.mark.parametrize("values", [RAGGED, normal(3, 12), normal(1, 6)], ids=["ragged", "3x12", "1x6"])
def test_the_intervals_are_those_of_the_slow_reference(values):
    by_hand = replicates_by_hand(values, 4000, np.random.default_rng(1))
    result = paired_bootstrap(values, replicates=20_000)
    one, other = values
    columns = {**dict(zip(values, by_hand.T, strict=True)), (one, other): by_hand[:, 0] - by_hand[:, 1]}
    for key, column in columns.items():
        found = result.difference[key] if isinstance(key, tuple) else result.mean[key]
        spread = column.std()
        assert found.low == pytest.approx(np.quantile(column, 0.025), abs=0.2 * spread)
        assert found.high == pytest.approx(np.quantile(column, 0.975), abs=0.2 * spread)


def test_a_seed_that_is_drawn_twice_draws_its_instances_twice():
    # With one draw for both, the mean would be 0 or 100 half of the time that a seed comes twice.
    values = {"a": [[0.0, 100.0], [0.0, 100.0]]}
    # Means of four draws: 0 and 100 with probability 1/16 each.
    assert paired_bootstrap(values, level=0.84).mean["a"] == Interval(50.0, 25.0, 75.0)


def test_methods_stay_paired():
    base = normal(3, 40)["a"]
    result = paired_bootstrap({"a": base, "better": base + 2.0}, replicates=300)
    gain = result.difference["better", "a"]
    assert (gain.low, gain.estimate, gain.high) == pytest.approx((2.0, 2.0, 2.0))
    assert result.mean["a"].high - result.mean["a"].low > 1


def test_the_same_seed_gives_the_same_result_and_another_seed_another():
    values = normal(3, 20)
    assert paired_bootstrap(values, 200, 7).mean == paired_bootstrap(values, 200, 7).mean
    assert paired_bootstrap(values, 200, 7).difference == paired_bootstrap(values, 200, 7).difference
    assert paired_bootstrap(values, 200, 7).mean != paired_bootstrap(values, 200, 8).mean


def coverage(seeds, instances, seed_deviation, datasets=300, replicates=500):
    """How often the interval of a difference held its true value, 0; instances deviate by 1."""
    generator, held = np.random.default_rng(0), 0
    for index in range(datasets):
        shared = generator.normal(0, 3, (seeds, instances))
        own = generator.normal(0, seed_deviation, (seeds, 1)) + generator.normal(0, 1, (seeds, instances))
        result = paired_bootstrap({"a": shared, "b": shared + own}, replicates, seed=index)
        held += result.difference["b", "a"].low <= 0 <= result.difference["b", "a"].high
    return held / datasets


# 300 datasets: standard deviation 0.013 around 0.95.
def test_one_seed_covers_what_instances_vary():
    assert 0.91 <= coverage(1, 60, 0.0) <= 0.98


def test_three_seeds_that_differ_cover_too_little_and_the_documentation_says_so():
    assert 0.6 < coverage(3, 60, 1.0) < 0.85


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "instances per seed are none"),
        ({"a": []}, r"instances per seed are \{'a': \[\]\}"),
        ({"a": [[]]}, r"values\['a'\]\[0\]: has shape \(0,\); expected 1 axes of numbers, not empty"),
        ({"a": [1.0, 2.0]}, r"values\['a'\]\[0\]: has shape \(\); expected 1 axes of numbers"),
        (
            {"a": [[1.0], [1.0, 2.0]], "b": [[1.0], [1.0, 2.0, 3.0]]},
            r"instances per seed are \{'a': \[1, 2\], 'b': \[1, 3\]\}; expected the same",
        ),
        ({"a": [[1.0]], "b": [[float("nan")]]}, r"values\['b'\]\[0\]\[0\] is nan; expected a finite number"),
    ],
)
def test_values_that_cannot_be_paired_are_named(values, message):
    with pytest.raises(DataError, match=message):
        paired_bootstrap(values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replicates": 0}, "replicates is 0; expected a whole number of at least 1"),
        ({"level": 1.0}, r"level is 1.0; expected a share in \(0, 1\)"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        paired_bootstrap({"a": [[1.0]]}, **options)


def test_columns_of_the_plain_bootstrap_share_their_draws():
    items = np.random.default_rng(0).normal(50, 10, 100)
    means = resampled_means(np.stack([items, items + 2], axis=1))
    assert means[:, 1] - means[:, 0] == pytest.approx(np.full(10_001, 2.0))
    found = percentile_interval(means[:, 0])
    assert found.estimate == pytest.approx(items.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * items.std() / 10, rel=0.05)


def test_sign_flips_by_hand():
    # Differences 3, 2, −1: sum 4. Of the 8 sign patterns the sums 6, 4, −4, −6 are as far from 0.
    assert sign_flip_p_value([[3.0, 2.0, 0.0] + [7.0] * 100], [[0.0, 0.0, 1.0] + [7.0] * 100]) == 0.5
    assert sign_flip_p_value([[5.0, 6.0, 7.0]], [[1.0, 1.0, 1.0]]) == 0.25
    # Seeds weigh the same: −1/2, 1/2, 1/2, 1/2; of 16 sums, 2 are ±2 and 8 are ±1.
    assert sign_flip_p_value([[0.0], [3.0, 3.0, 3.0]], [[1.0], [0.0, 0.0, 0.0]]) == 10 / 16
    assert sign_flip_p_value([[0.1, 0.2, 0.0]], [[0.0, 0.0, 0.3]]) == 1  # 0 but for rounding


def test_random_sign_patterns_agree_with_all_patterns(monkeypatch):
    one, other = np.random.default_rng(4).normal(0.4, 1, (2, 8)), np.zeros((2, 8))
    exact = sign_flip_p_value(one, other)
    monkeypatch.setattr("hiplora.metrics.bootstrap._EXACT", 0)
    monkeypatch.setattr("hiplora.metrics.bootstrap._CHUNK", 7 * 16)
    assert sign_flip_p_value(one, other, 20_000) == pytest.approx(exact, abs=0.015)
    assert sign_flip_p_value([[1.0] * 40], [[0.0] * 40], permutations=99) == 1 / 100


def test_students_interval():
    assert student_margin(2.0, 4) == pytest.approx(3.18245, abs=1e-5)  # t(0.975; 3) = 3.18245, over √4
