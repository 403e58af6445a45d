import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiplora.errors import ConfigError, DataError
from hiplora.metrics import sign_flip_p_value

few = settings(max_examples=50, deadline=None, derandomize=True, database=None)


def test_by_hand():
    # Differences 3, 2, −1: sum 4. Of the 8 sign patterns the sums 6, 4, −4, −6 are as far from 0: 4 of 8.
    assert sign_flip_p_value([[3.0, 2.0, 0.0]], [[0.0, 0.0, 1.0]]) == 0.5


def test_three_seeds_that_agree_can_give_no_less_than_a_quarter():
    assert sign_flip_p_value([[5.0, 6.0, 7.0]], [[1.0, 1.0, 1.0]]) == 0.25


def test_seeds_weigh_the_same_whatever_their_instances():
    # Differences −1 in one seed, 3, 3, 3 in the other: in the mean they weigh −1/2, 1/2, 1/2, 1/2, in sum 1.
    # Of 16 sums of four halves, 2 are ±2 and 8 are ±1. If each instance weighed the same, 4 would be as large.
    assert sign_flip_p_value([[0.0], [3.0, 3.0, 3.0]], [[1.0], [0.0, 0.0, 0.0]]) == 10 / 16


def test_methods_that_do_not_differ_have_a_p_value_of_1():
    assert sign_flip_p_value([[1.0, 2.0]], [[1.0, 2.0]]) == 1
    # As many up as down, with sums that are 0 but for rounding.
    assert sign_flip_p_value([[0.1, 0.2, 0.0]], [[0.0, 0.0, 0.3]]) == 1


def test_instances_that_do_not_differ_do_not_matter():
    assert sign_flip_p_value([[3.0, 2.0, 0.0] + [7.0] * 100], [[0.0, 0.0, 1.0] + [7.0] * 100]) == 0.5


def test_random_patterns_agree_with_all_patterns(monkeypatch):
    generator = np.random.default_rng(4)
    one, other = generator.normal(0.4, 1, (2, 8)), np.zeros((2, 8))
    exact = sign_flip_p_value(one, other)
    assert 0.02 < exact < 0.5
    monkeypatch.setattr("hiplora.metrics.sign_flip._EXACT", 0)
    assert sign_flip_p_value(one, other, 20_000) == pytest.approx(exact, abs=0.015)


def test_random_patterns_never_give_zero():
    assert sign_flip_p_value([[1.0] * 40], [[0.0] * 40], permutations=99) == 1 / 100


def test_the_work_is_cut_into_pieces_of_which_each_counts(monkeypatch):
    monkeypatch.setattr("hiplora.metrics.sign_flip._CHUNK", 7 * 60)
    up_and_down = [[1.0, -1.0] * 30]  # a mean of 0, which every pattern reaches
    assert sign_flip_p_value(up_and_down, [[0.0] * 60], 1000) == 1
    assert sign_flip_p_value([[1.0] * 60], [[0.0] * 60], 1000) == 1 / 1001  # which none does


@few
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=20), st.integers(0, 50))
def test_it_is_the_same_from_either_side_and_for_the_same_seed(values, seed):
    zeros = [0.0] * len(values)
    found = sign_flip_p_value([values], [zeros], 200, seed)
    assert found == sign_flip_p_value([zeros], [values], 200, seed)
    assert 0 < found <= 1


def test_true_nulls_are_rejected_as_rarely_as_promised():
    generator = np.random.default_rng(0)
    found = [
        sign_flip_p_value(generator.normal(0, 1, (1, 30)), np.zeros((1, 30)), permutations=199)
        for _ in range(600)
    ]
    # Binomial(600, 0.05): standard deviation 0.009.
    assert np.mean(np.array(found) <= 0.05) == pytest.approx(0.05, abs=0.03)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sign_flip_p_value([], []), DataError, "there are 0 and 0 seeds"),
        (lambda: sign_flip_p_value([[1.0]], [[1.0], [2.0]]), DataError, "there are 1 and 2 seeds"),
        (
            lambda: sign_flip_p_value([[1.0], [1.0]], [[1.0], [2.0, 3.0]]),
            DataError,
            "seed 1 has 1 and 2 instances",
        ),
        (lambda: sign_flip_p_value([[1.0, float("nan")]], [[1.0, 1.0]]), DataError, r"one\[0\]\[1\] is nan"),
        (lambda: sign_flip_p_value([[1.0]], [[2.0]], 0), ConfigError, "permutations is 0"),
        (lambda: sign_flip_p_value([[1.0]], [[2.0]], 10, -1), ConfigError, "seed is -1"),
    ],
)
def test_what_cannot_be_tested_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
