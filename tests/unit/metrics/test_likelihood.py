import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiplora.errors import ConfigError, DataError
from hiplora.metrics import answer_likelihood, gold_probability

few = settings(max_examples=50, deadline=None, derandomize=True, database=None)

choices = st.lists(st.floats(-1e4, 0), min_size=1, max_size=8)


def test_a_token_of_the_answer_is_as_likely_as_the_geometric_mean():
    # Tokens of probability 0.5 and 0.02: √0.01 = 0.1.
    assert answer_likelihood(math.log(0.5) + math.log(0.02), 2) == pytest.approx(10.0)


def test_a_certain_answer_scores_100_and_a_hopeless_one_0():
    assert answer_likelihood(0.0, 3) == 100
    assert answer_likelihood(1e-7, 3) == 100  # rounding
    assert answer_likelihood(-1e6, 3) == 0


def test_the_right_choice_has_its_share():
    # Odds 1 : 3 : 4 with a common factor that does not matter.
    likelihoods = [math.log(1) - 700, math.log(3) - 700, math.log(4) - 700]
    assert [gold_probability(likelihoods, gold) for gold in range(3)] == pytest.approx([12.5, 37.5, 50.0])


def test_who_cannot_tell_the_choices_apart_scores_by_chance():
    assert gold_probability([-20.0] * 4, 2) == 25


@few
@given(choices, st.floats(-1000, 1000))
def test_the_shares_add_up_and_only_differences_matter(likelihoods, shift):
    shares = [gold_probability(likelihoods, gold) for gold in range(len(likelihoods))]
    assert sum(shares) == pytest.approx(100)
    shifted = [value + shift for value in likelihoods]
    assert [gold_probability(shifted, gold) for gold in range(len(likelihoods))] == pytest.approx(
        shares, abs=1e-6
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: answer_likelihood(-1.0, 0),
            ConfigError,
            "tokens is 0; expected a whole number of at least 1",
        ),
        (lambda: answer_likelihood(0.5, 1), DataError, "log_prob is 0.5; a log-probability is at most 0"),
        (lambda: answer_likelihood(math.nan, 1), DataError, "log_prob is nan"),
        (lambda: gold_probability([], 0), DataError, r"log_likelihoods: has shape \(0,\)"),
        (lambda: gold_probability([-1.0, -math.inf], 0), DataError, r"log_likelihoods\[1\] is -inf"),
        (lambda: gold_probability([-1.0, -2.0], 2), DataError, "gold is 2, and there are 2 choices"),
        (lambda: gold_probability([-1.0, -2.0], -1), ConfigError, "gold is -1"),
    ],
)
def test_what_has_no_likelihood_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
