import numpy as np
import pytest

from hiplora.errors import DataError
from hiplora.metrics import Locality, edit_preferred, edit_success, locality


def test_an_edit_took_where_the_new_answer_is_likelier_than_the_old():
    preferred = edit_preferred([-1.0, -5.0, -3.0, -0.1], [-2.0, -4.0, -3.0, -9.0])
    assert preferred.tolist() == [True, False, False, True]  # the third ties
    assert edit_success(preferred) == 50


def test_success_counts_matches_as_well():
    assert edit_success([True, False, True, True]) == 75
    assert edit_success(np.array([0, 0, 1])) == pytest.approx(100 / 3)


def test_locality_is_the_change_on_unrelated_prompts():
    # Right before: 3 of 4; after: 2 of 4. Changes of log p: −0.5, 0, +0.2.
    found = locality([1, 1, 1, 0], [True, False, False, True], [-1.0, -2.0, -3.0], [-1.5, -2.0, -2.8])
    assert found.accuracy_change == pytest.approx(-25)
    assert found.log_prob_change == pytest.approx(-0.1)


def test_log_probabilities_may_be_left_out():
    assert locality([True, False], [True, True]) == Locality(50.0, None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: edit_success([]), r"successes: has shape \(0,\)"),
        (lambda: edit_success([True, 2]), r"successes\[1\] is 2.0; expected True or False"),
        (lambda: edit_success([True, float("nan")]), r"successes\[1\] is nan"),
        (lambda: edit_preferred([-1.0], [-1.0, -2.0]), "log_prob_new has 1 values, log_prob_old has 2"),
        (lambda: edit_preferred([-1.0, float("-inf")], [-1.0, -2.0]), r"log_prob_new\[1\] is -inf"),
        (lambda: locality([], []), "base_correct: has shape"),
        (lambda: locality([1], [1, 0]), "base_correct has 1 values, edited_correct has 2"),
        (lambda: locality([1], [1], [-1.0]), "log-probabilities are given of one model only"),
        (lambda: locality([1], [1], None, [-1.0]), "log-probabilities are given of one model only"),
        (
            lambda: locality([1], [1], [-1.0], [-1.0, -2.0]),
            "base_log_probs has 1 values, edited_log_probs has 2",
        ),
    ],
)
def test_what_cannot_be_counted_is_named(call, message):
    with pytest.raises(DataError, match=message):
        call()
