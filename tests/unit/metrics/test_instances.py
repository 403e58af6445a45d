import itertools
from collections import Counter

import pytest

from hiplora.errors import ConfigError
from hiplora.metrics import merge_instances

POOL = ["mmlu", "scienceqa", "gsm8k", "code"]
SEEDS = [42, 100, 2024]


def test_a_merge_names_different_tasks_in_the_pools_order_each_with_a_seed():
    drawn = merge_instances(POOL, [2, 3, 4], SEEDS, 20, seed=0)
    assert list(drawn) == [2, 3, 4]
    for size, merges in drawn.items():
        assert len(merges) == len(set(merges)) == 20
        for merge in merges:
            places = [POOL.index(task) for task, _ in merge]
            assert places == sorted(set(places))
            assert len(merge) == size
            assert {seed for _, seed in merge} <= set(SEEDS)


def test_what_is_drawn_of_a_size_does_not_hang_on_the_others():
    assert merge_instances(POOL, [2, 3, 4], SEEDS, 9, 5)[3] == merge_instances(POOL, [3], SEEDS, 9, 5)[3]


@pytest.mark.parametrize("count", [54, 55, 1000])
def test_where_there_are_not_more_all_are_taken(count):
    # Two of four tasks, three seeds each: 6 · 3² = 54.
    expected = {
        tuple(zip(subset, trained, strict=True))
        for subset in itertools.combinations(POOL, 2)
        for trained in itertools.product(SEEDS, repeat=2)
    }
    merges = merge_instances(POOL, [2], SEEDS, count, 0)[2]
    assert len(merges) == 54
    assert set(merges) == expected
    assert merges == merge_instances(POOL, [2], SEEDS, count, 1)[2]


# 15 asked of 54 are drawn one by one, 40 of 54 from the list of all: two ways to the same distribution.
@pytest.mark.parametrize("count", [15, 40])
def test_every_merge_is_as_likely_as_every_other(count):
    rounds = 400
    seen = Counter(merge for seed in range(rounds) for merge in merge_instances(POOL, [2], SEEDS, count, seed)[2])
    assert len(seen) == 54
    share = count / 54
    deviation = (rounds * share * (1 - share)) ** 0.5
    assert all(abs(times - rounds * share) < 4.5 * deviation for times in seen.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((POOL, [1], SEEDS, 5, 0), "size is 1; expected a whole number of at least 2"),
        ((POOL, [5], SEEDS, 5, 0), "size is 5, and the pool has 4 tasks; lower it or add tasks"),
        ((POOL, [2], SEEDS, 0, 0), "count is 0; expected a whole number of at least 1"),
        ((POOL, [2], SEEDS, 5, -1), "seed is -1"),
    ],
)
def test_a_drawing_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        merge_instances(*arguments)
