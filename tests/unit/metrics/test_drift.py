import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiplora.errors import DataError
from hiplora.metrics import kl_drift, per_token, perplexity_ratio

few = settings(max_examples=50, deadline=None, derandomize=True, database=None)

log_probs = st.lists(st.floats(-50, 0), min_size=1, max_size=20)


def distributions(seed, tokens=7, vocabulary=11):
    logits = np.random.default_rng(seed).normal(size=(tokens, vocabulary))
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def test_divergence_by_hand():
    base, adapted = np.log([[0.5, 0.5], [0.9, 0.1]]), np.log([[0.25, 0.75], [0.9, 0.1]])
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert kl_drift(base, adapted) == pytest.approx((first + 0) / 2)


@few
@given(st.integers(0, 1000))
def test_divergence_is_zero_only_from_itself(seed):
    base, adapted = distributions(seed), distributions(seed + 1)
    assert kl_drift(base, base) == 0
    assert kl_drift(base, adapted) > 0


def test_what_the_base_excludes_adds_nothing():
    base = [[math.log(0.5), math.log(0.5), -math.inf]]
    adapted = [[math.log(0.4), math.log(0.4), math.log(0.2)]]
    assert kl_drift(base, adapted) == pytest.approx(math.log(0.5 / 0.4))
    assert kl_drift(base, base) == 0


def test_perplexity_ratio_by_hand():
    # Mean NLL 1.5 before, 2 after.
    assert perplexity_ratio([-1.0, -2.0], [-1.5, -2.5]) == pytest.approx(math.exp(0.5))


def test_every_token_weighs_the_same_whichever_passage_it_is_from():
    assert per_token([6.0, 2.0], [3, 1]) == pytest.approx(2.0)
    assert per_token([6.0, 1.0], [3, 4]) == pytest.approx(1.0)  # the mean of the passages' means is 1.125
    # 4 tokens lost 0.1 nats each, 1 token gained 1.4: (0.4 − 1.4) / 5 = −0.2.
    assert perplexity_ratio([-4.0, -2.0], [-4.4, -0.6], counts=[4, 1]) == pytest.approx(math.exp(-0.2))


@few
@given(log_probs, st.randoms())
def test_sums_over_passages_give_what_the_tokens_give(tokens, random):
    adapted = [value - random.random() for value in tokens]
    cut = random.randrange(1, len(tokens) + 1)
    parts = [part for part in (slice(0, cut), slice(cut, None)) if tokens[part]]
    sums = [[sum(values[part]) for part in parts] for values in (tokens, adapted)]
    counts = [len(tokens[part]) for part in parts]
    assert perplexity_ratio(*sums, counts) == pytest.approx(perplexity_ratio(tokens, adapted))


@few
@given(log_probs)
def test_there_and_back_is_no_change(base):
    adapted = [value / 2 for value in base]
    assert perplexity_ratio(base, adapted) * perplexity_ratio(adapted, base) == pytest.approx(1)
    assert perplexity_ratio(base, base) == 1


HALVES = np.log([[0.5, 0.5]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kl_drift(HALVES, distributions(0)), r"base has shape \(1, 2\), adapted has \(7, 11\)"),
        (
            lambda: kl_drift(HALVES, [[0.0, -math.inf]]),
            r"adapted\[0\]\[1\] is -inf; expected a probability above 0",
        ),
        (
            lambda: kl_drift([[3.0, 900.0]], HALVES),
            r"base: the sum of probabilities in row \[0\] is inf.*not logits",
        ),
        (lambda: kl_drift(HALVES, [[0.2, 0.3]]), r"adapted: the sum of probabilities in row \[0\] is 2.5"),
        (lambda: kl_drift([[math.nan, 0.0]], HALVES), r"base\[0\]\[0\] is nan"),
        (lambda: kl_drift(HALVES[0], HALVES[0]), r"base: has shape \(2,\); expected a table"),
        (lambda: perplexity_ratio([], []), r"base: has shape \(0,\)"),
        (lambda: perplexity_ratio([-1.0], [-1.0, -2.0]), "base has 1 values, adapted has 2"),
        (lambda: perplexity_ratio([-1.0, -2.0], [-1.0, math.nan]), r"adapted\[1\] is nan"),
        (lambda: perplexity_ratio([-1.0], [-2000.0]), "1999 nats a token less likely.*give counts"),
        (
            lambda: perplexity_ratio([-1.0], [-1.0], [0]),
            r"counts\[0\] is 0.0; expected a whole number of at least 1",
        ),
        (lambda: per_token([1.0], [1.5]), r"counts\[0\] is 1.5"),
        (lambda: per_token([1.0], [1, 2]), "there are 1 sums and 2 counts"),
    ],
)
def test_what_is_no_drift_is_named(call, message):
    with pytest.raises(DataError, match=message):
        call()
