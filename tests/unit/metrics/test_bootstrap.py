"""The intervals by a slow reference and by how often they hold the truth; sign flips; and the merges that are drawn."""

import itertools
from collections import Counter

import numpy as np
import pytest

from hiplora.errors import ConfigError, DataError
from hiplora.metrics import Interval, merge_instances, paired_bootstrap, sign_flip_p_value, student_margin
from hiplora.metrics.bootstrap import percentile_interval, resampled_means

RAGGED = {"lora": [[10.0, 20.0, 30.0], [40.0], [0.0, 100.0]], "hiplora": [[12.0, 26.0, 31.0], [45.0], [10.0, 90.0]]}
POOL, SEEDS = ["mmlu", "scienceqa", "gsm8k", "code"], [42, 100, 2024]


def normal(seeds, instances):
    generator = np.random.default_rng(0)
    return {method: generator.normal(50, 10, (seeds, instances)) for method in "ab"}


def replicates_by_hand(values, count, generator):
    """Means of all methods in each replicate, by loops: seeds, then instances in each, the same for all methods."""
    replicates = []
    for _ in range(count):
        means = {method: [] for method in values}
        seeds = len(next(iter(values.values())))
        for seed in generator.integers(seeds, size=seeds):
            size = len(next(iter(values.values()))[seed])
            chosen = generator.integers(size, size=size)
            for method, rows in values.items():
                means[method].append(np.mean([rows[seed][i] for i in chosen]))
        replicates.append([np.mean(row) for row in means.values()])
    return np.array(replicates)


@pytest.mark.parametrize("values", [RAGGED, normal(3, 12), normal(1, 6)], ids=["ragged", "3x12", "1x6"])
def test_the_intervals_are_those_of_the_slow_reference(values):
    by_hand = replicates_by_hand(values, 4000, np.random.default_rng(1))
    result = paired_bootstrap(values, replicates=20_000)
    one, other = values
    columns = {**dict(zip(values, by_hand.T, strict=True)), (one, other): by_hand[:, 0] - by_hand[:, 1]}
    for key, column in columns.items():
        interval = result.difference[key] if isinstance(key, tuple) else result.mean[key]
        spread = column.std()
        assert interval.low == pytest.approx(np.quantile(column, 0.025), abs=0.2 * spread)
        assert interval.high == pytest.approx(np.quantile(column, 0.975), abs=0.2 * spread)
    if values is RAGGED:  # the mean over seeds of the mean over instances
        assert result.mean["lora"].estimate == pytest.approx((20 + 40 + 50) / 3)
        assert result.difference["hiplora", "lora"].estimate == pytest.approx((3 + 5 + 0) / 3)


def test_a_seed_that_is_drawn_twice_draws_its_instances_twice():
    # With one draw for both, the mean would be 0 or 100 half of the time that a seed comes twice.
    values = {"a": [[0.0, 100.0], [0.0, 100.0]]}
    # Means of four draws: 0 and 100 with probability 1/16 each.
    assert paired_bootstrap(values, level=0.84).mean["a"] == Interval(50.0, 25.0, 75.0)


def test_methods_stay_paired_and_a_seed_fixes_the_result():
    base = normal(3, 40)["a"]
    one, again, other = (paired_bootstrap({"a": base, "better": base + 2.0}, 300, seed) for seed in (7, 7, 8))
    gain = one.difference["better", "a"]
    assert (gain.low, gain.estimate, gain.high) == pytest.approx((2.0, 2.0, 2.0))
    assert one.mean["a"].high - one.mean["a"].low > 1
    assert one == again
    assert one.mean != other.mean


# 300 datasets: standard deviation 0.013 around 0.95. Three seeds that differ cover too little, as the docs say.
@pytest.mark.parametrize(("seeds", "deviation", "low", "high"), [(1, 0.0, 0.91, 0.98), (3, 1.0, 0.6, 0.85)])
def test_how_often_the_interval_of_a_difference_holds_its_true_value(seeds, deviation, low, high):
    generator, held = np.random.default_rng(0), 0
    for index in range(300):
        shared = generator.normal(0, 3, (seeds, 60))
        own = generator.normal(0, deviation, (seeds, 1)) + generator.normal(0, 1, (seeds, 60))
        result = paired_bootstrap({"a": shared, "b": shared + own}, 500, seed=index)
        held += result.difference["b", "a"].low <= 0 <= result.difference["b", "a"].high
    assert low <= held / 300 <= high


UNEQUAL = {"a": [[1.0, 2.0]], "b": [[1.0]]}
NAN = {"a": [[1.0]], "b": [[float("nan")]]}


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [
        (DataError, lambda: paired_bootstrap({}), "instances per seed are none"),
        (DataError, lambda: paired_bootstrap({"a": []}), r"instances per seed are \{'a': \[\]\}"),
        (DataError, lambda: paired_bootstrap({"a": [[]]}), r"values\['a'\]\[0\]: has shape \(0,\); .* not empty"),
        (DataError, lambda: paired_bootstrap(UNEQUAL), r"\{'a': \[2\], 'b': \[1\]\}; expected the same"),
        (DataError, lambda: paired_bootstrap(NAN), r"values\['b'\]\[0\]\[0\] is nan; expected a finite number"),
        (ConfigError, lambda: paired_bootstrap(RAGGED, replicates=0), "replicates is 0; .* number of at least 1"),
        (ConfigError, lambda: paired_bootstrap(RAGGED, level=1.0), r"level is 1.0; expected a share in \(0, 1\)"),
        (ConfigError, lambda: merge_instances(POOL, [1], SEEDS, 5, 0), "size is 1; .* whole number of at least 2"),
        (ConfigError, lambda: merge_instances(POOL, [5], SEEDS, 5, 0), "size is 5, and the pool has 4 tasks; lower"),
        (ConfigError, lambda: merge_instances(POOL, [2], SEEDS, 5, -1), "seed is -1"),
        (
            ConfigError,
            lambda: merge_instances(["a"] * 10, [2], SEEDS, 5, 0),
            "tasks are .*; expected each of them once",
        ),
        (ConfigError, lambda: merge_instances(POOL, [2], [7, 7, 7], 5, 0), "seeds are .*; expected each of them once"),
        (ConfigError, lambda: sign_flip_p_value([[1.0] * 40], [[0.0] * 40], permutations=-5), "permutations is -5"),
    ],
)
def test_values_that_cannot_be_paired_and_options_out_of_range_are_named(error, call, message):
    with pytest.raises(error, match=message):
        call()


def test_columns_of_the_plain_bootstrap_share_their_draws():
    items = np.random.default_rng(0).normal(50, 10, 100)
    means = resampled_means(np.stack([items, items + 2], axis=1))
    assert means[:, 1] - means[:, 0] == pytest.approx(np.full(10_001, 2.0))
    interval = percentile_interval(means[:, 0])
    assert interval.estimate == pytest.approx(items.mean())
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * items.std() / 10, rel=0.05)


def test_sign_flips_and_students_interval_by_hand():
    # Differences 3, 2, −1: sum 4. Of the 8 sign patterns the sums 6, 4, −4, −6 are as far from 0.
    assert sign_flip_p_value([[3.0, 2.0, 0.0] + [7.0] * 100], [[0.0, 0.0, 1.0] + [7.0] * 100]) == 0.5
    # Seeds weigh the same: −1/2, 1/2, 1/2, 1/2; of 16 sums, 2 are ±2 and 8 are ±1.
    assert sign_flip_p_value([[0.0], [3.0, 3.0, 3.0]], [[1.0], [0.0, 0.0, 0.0]]) == 10 / 16
    assert sign_flip_p_value([[0.1, 0.2, 0.0]], [[0.0, 0.0, 0.3]]) == 1  # 0 but for rounding
    assert student_margin(2.0, 4) == pytest.approx(3.18245, abs=1e-5)  # t(0.975; 3) = 3.18245, over √4


def test_random_sign_patterns_agree_with_all_patterns(monkeypatch):
    one, other = np.random.default_rng(4).normal(0.4, 1, (2, 8)), np.zeros((2, 8))
    exact = sign_flip_p_value(one, other)
    monkeypatch.setattr("hiplora.metrics.bootstrap._EXACT", 0)
    monkeypatch.setattr("hiplora.metrics.bootstrap._CHUNK", 7 * 16)
    assert sign_flip_p_value(one, other, 20_000) == pytest.approx(exact, abs=0.015)
    assert sign_flip_p_value([[1.0] * 40], [[0.0] * 40], permutations=99) == 1 / 100


def test_a_merge_names_different_tasks_in_the_pools_order_whatever_other_sizes_are_drawn():
    drawn = merge_instances(POOL, [2, 3, 4], SEEDS, 20, seed=0)
    for size, merges in drawn.items():
        assert len(merges) == len(set(merges)) == 20
        assert merges == merge_instances(POOL, [size], SEEDS, 20, seed=0)[size]
        for merge in merges:
            places = [POOL.index(task) for task, _ in merge]
            assert places == sorted(set(places))
            assert len(merge) == size
            assert {seed for _, seed in merge} <= set(SEEDS)


# Two of four tasks, three seeds each: 6 · 3² = 54.
@pytest.mark.parametrize("count", [54, 1000])
def test_where_there_are_not_more_all_are_taken(count):
    choices = itertools.product(itertools.combinations(POOL, 2), SEEDS, SEEDS)
    expected = {((a, one), (b, other)) for (a, b), one, other in choices}
    merges = merge_instances(POOL, [2], SEEDS, count, 0)[2]
    assert len(merges) == 54
    assert set(merges) == expected


# 15 asked of 54 are drawn one by one, 40 of 54 from the list of all: two ways to the same distribution.
@pytest.mark.parametrize("count", [15, 40])
def test_every_merge_is_as_likely_as_every_other(count):
    rounds, share = 400, count / 54
    seen = Counter(merge for seed in range(rounds) for merge in merge_instances(POOL, [2], SEEDS, count, seed)[2])
    assert len(seen) == 54
    deviation = (rounds * share * (1 - share)) ** 0.5
    assert all(abs(times - rounds * share) < 4.5 * deviation for times in seen.values())
