"""The paper's metrics, by hand and by their invariances."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiplora import metrics as m
from hiplora.errors import ConfigError, DataError

few = settings(max_examples=30, deadline=None, derandomize=True, database=None)

BASE = {"mmlu": 60.0, "scienceqa": 70.0, "gsm8k": 40.0, "code": 30.0}
ADAPTED = {"mmlu": 50.0, "scienceqa": 73.0, "gsm8k": 90.0, "code": 25.0}
SINGLE = [{"a": 80.0, "b": 50.0}, {"a": 80.0, "c": 20.0}, {"b": 50.0, "c": 20.0}, {"a": 10.0, "b": 10.0}]
MERGED = [{"a": 72.0, "b": 45.0}, {"a": 79.0, "c": 17.9}, {"b": 52.0, "c": 18.5}, {"a": 9.9, "b": 4.0}]
MATRIX = [[50.0, None, None], [45.0, 60.0, math.nan], [48.0, 52.0, 70.0]]


def test_retain_is_the_mean_drop_on_the_other_benchmarks():
    # ((60 − 50) + (70 − 73) + (30 − 25)) / 3: a gain is a negative drop, gsm8k is left out.
    assert m.retain(BASE, ADAPTED, "gsm8k") == pytest.approx(4.0)
    others = {name: score for name, score in ADAPTED.items() if name != "gsm8k"}
    assert m.retain(BASE, others, "gsm8k") == pytest.approx(4.0)


def test_a_merge_fails_if_any_task_falls_below_the_threshold():
    # Smallest merged/single of each: 0.9, 0.895, 0.925, 0.4.
    shares = [m.merge_fail(MERGED, SINGLE, tau) for tau in (0.4, 0.5, m.DEFAULT_TAU, 0.91, 1.0)]
    assert shares == [0, 0.25, 0.5, 0.75, 1]


def test_a_score_on_the_threshold_passes_whatever_the_rounding():
    assert 55.0 < 0.55 * 100.0  # in floating point
    assert m.merge_fail([{"a": 55.0}], [{"a": 100.0}], 0.55) == 0
    assert m.merge_fail([{"a": 54.999999}], [{"a": 100.0}], 0.55) == 1


def test_the_mean_drop_is_absolute_and_every_metric_weighs_the_same():
    assert m.mean_post_merge_drop({"a": 70.0, "b": 56.0}, {"a": 80.0, "b": 50.0}) == 8
    single, merged = [{"a": 10.0, "b": 10.0, "c": 10.0}, {"a": 10.0}], [dict.fromkeys("abc", 8.0), {"a": 0.0}]
    assert m.mean_post_merge_drop(merged, single) == (2 + 2 + 2 + 10) / 4


def test_continual_metrics_by_hand():
    assert m.average_accuracy(MATRIX) == pytest.approx((48 + 52 + 70) / 3)
    assert m.forgetting(MATRIX) == pytest.approx(((50 - 48) + (60 - 52)) / 2)
    assert m.backward_transfer(MATRIX) == pytest.approx(((48 - 50) + (52 - 60)) / 2)
    assert m.learned_accuracy(MATRIX) == pytest.approx(60.0)


def test_replicates_of_a_matrix_are_computed_apart():
    matrices = np.random.default_rng(0).uniform(0, 100, (3, 3, 5))
    for name, function in {"forgetting": m.forgetting, "backward transfer": m.backward_transfer}.items():
        values = m.CONTINUAL[name](matrices)
        assert values == pytest.approx([function(matrices[:, :, i]) for i in range(5)])


def test_likelihoods_by_hand():
    assert m.answer_likelihood(4 * math.log(0.5), 4) == pytest.approx(50)
    assert m.answer_likelihood(0.0005, 1) == 100
    assert m.gold_probability([math.log(1), math.log(3)], 1) == pytest.approx(75)
    assert m.gold_probability([-5000.0, -5001.0], 0) == pytest.approx(100 / (1 + math.exp(-1)))


@few
@given(st.integers(1, 30), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    wrong = math.prod((n - c - i) / (n - i) for i in range(k)) if n - c >= k else 0.0
    assert m.pass_at_k(n, c, k) == pytest.approx(1 - wrong)
    assert m.pass_at_k(n, c, 1) == pytest.approx(c / n)


def test_locality_is_the_change_on_unrelated_prompts():
    change = m.locality([1, 1, 1, 0], [1, 0, 0, 0], [-1.0, -2.0], [-1.5, -3.0])
    assert (change.accuracy_change, change.log_prob_change) == (-50, -0.75)
    assert m.locality([True], [True]).log_prob_change is None


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [
        (DataError, lambda: m.retain(BASE, {**ADAPTED, "x": 1.0}, "gsm8k"), "base: benchmark 'x' is missing"),
        (DataError, lambda: m.retain(BASE, {"mmlu": 1.0}, "gsm8k"), "adapted: benchmark 'scienceqa' is missing"),
        (DataError, lambda: m.retain({"gsm8k": 1.0}, ADAPTED, "gsm8k"), "no benchmark but the domain"),
        (DataError, lambda: m.merge_fail(MERGED, SINGLE[:3], 0.9), "merged has 4 merges, single has 3"),
        (DataError, lambda: m.merge_fail([{"a": 1.0}], [{"a": -3.0}], 0.9), r"single\[0\]\['a'\] is -3.0"),
        (DataError, lambda: m.forgetting([[1.0, 2.0]]), "one row per stage"),
        (DataError, lambda: m.forgetting([[1.0, 2.0], [None, 2.0]]), r"matrix\[1\]\[0\] is nan"),
        (DataError, lambda: m.answer_likelihood(0.1, 1), "at most 0"),
        (DataError, lambda: m.gold_probability([1.0], 1), "gold is 1"),
        (DataError, lambda: m.pass_at_k(3, 4, 1), "c is 4"),
        (DataError, lambda: m.locality([], []), "not empty"),
        (DataError, lambda: m.locality([1], [1, 0]), "base_correct has 1 values"),
        (ConfigError, lambda: m.retain(BASE, ADAPTED, "humaneval"), "expected one of mmlu, "),
        (ConfigError, lambda: m.merge_fail(MERGED, SINGLE, 90), r"tau is 90; expected a threshold in \(0, 1\]"),
        (ConfigError, lambda: m.answer_likelihood(-1.0, 0), "tokens is 0"),
        (ConfigError, lambda: m.gold_probability([1.0], -1), "gold is -1"),
        (ConfigError, lambda: m.pass_at_k(3, 1, 4), "k is 4"),
    ],
)
def test_what_cannot_be_used_is_named(error, call, message):
    with pytest.raises(error, match=message):
        call()
