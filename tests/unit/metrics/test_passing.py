import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiplora.errors import ConfigError, DataError
from hiplora.metrics import pass_at_k

few = settings(max_examples=50, deadline=None, derandomize=True, database=None)


@st.composite
def counts(draw):
    n = draw(st.integers(1, 300))
    return n, draw(st.integers(0, n)), draw(st.integers(1, n))


def test_no_right_sample_is_a_plain_zero():
    assert str(pass_at_k(3, 0, 2)) == "0.0"


def test_by_hand():
    assert pass_at_k(5, 2, 1) == pytest.approx(2 / 5)
    assert pass_at_k(5, 2, 2) == pytest.approx(1 - 3 / 10)  # 3 of the 10 pairs hold no right one
    assert pass_at_k(5, 2, 4) == 1  # any four of five hold one of the two
    assert pass_at_k(10, 0, 5) == 0


@few
@given(counts())
def test_it_is_the_exact_fraction(case):
    n, c, k = case
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert pass_at_k(n, c, k) == pytest.approx(float(exact), rel=1e-11, abs=0)
    assert 0 <= pass_at_k(n, c, k) <= 1


@pytest.mark.parametrize(
    ("c", "k", "expected"),
    [
        (1, 10, 10 / 1_000_000),
        (300_000, 1, 0.3),
        (1, 400_000, 0.4),
        (500_000, 2, 1 - 500_000 * 499_999 / (1_000_000 * 999_999)),
        (400_000, 500_000, 1.0),
        (1_000_000, 1, 1.0),
    ],
)
def test_a_million_samples_are_no_trouble(c, k, expected):
    assert pass_at_k(1_000_000, c, k) == pytest.approx(expected, rel=1e-11)


def test_integers_of_numpy_are_whole_numbers():
    assert pass_at_k(np.int64(5), np.int32(2), np.int64(1)) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((10, 3, 11), ConfigError, "k is 11, and there are n = 10 samples; lower k or draw more samples"),
        ((10, 3, 0), ConfigError, "k is 0; expected a whole number of at least 1"),
        ((0, 0, 1), ConfigError, "n is 0"),
        ((10, -1, 1), ConfigError, "c is -1"),
        ((10, 11, 1), DataError, "c is 11 right samples of n = 10"),
        ((10.0, 3, 1), ConfigError, "n is 10.0; expected a whole number"),
    ],
)
def test_counts_that_make_no_sense_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        pass_at_k(*arguments)
