import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hiplora.errors import DataError
from hiplora.metrics import average_accuracy, backward_transfer, forgetting, learned_accuracy

few = settings(max_examples=50, deadline=None, derandomize=True, database=None)

ALL = (average_accuracy, forgetting, backward_transfer, learned_accuracy)
MATRIX = [
    [60.0, 40.0, 10.0],
    [66.0, 80.0, 12.0],
    [50.0, 70.0, 45.0],
]

matrices = st.integers(2, 6).flatmap(lambda n: arrays(float, (n, n), elements=st.floats(0, 100)))


def test_by_hand():
    assert average_accuracy(MATRIX) == pytest.approx((50 + 70 + 45) / 3)
    assert forgetting(MATRIX) == pytest.approx(
        ((66 - 50) + (80 - 70)) / 2
    )  # the best of task 0 came a stage late
    assert backward_transfer(MATRIX) == pytest.approx(((50 - 60) + (70 - 80)) / 2)
    assert learned_accuracy(MATRIX) == pytest.approx((60 + 80 + 45) / 3)


def test_what_was_known_before_a_task_was_trained_can_be_forgotten_too():
    assert forgetting([[50.0, 90.0, 0.0], [50.0, 70.0, 0.0], [50.0, 60.0, 0.0]]) == pytest.approx(
        (0 + 30) / 2
    )


def test_a_last_stage_that_helps_is_negative_forgetting_and_positive_transfer():
    assert forgetting([[50.0, 0.0], [57.0, 60.0]]) == -7
    assert backward_transfer([[50.0, 0.0], [57.0, 60.0]]) == 7


@pytest.mark.parametrize("unseen", [float("nan"), None])
def test_tasks_not_trained_yet_need_not_be_measured(unseen):
    matrix = [[60.0, unseen, unseen], [66.0, 80.0, unseen], [50.0, 70.0, 45.0]]
    for metric in ALL:
        assert metric(matrix) == metric(MATRIX)


@few
@given(matrices)
def test_forgetting_is_at_least_what_was_lost_since_training(matrix):
    assert forgetting(matrix) >= -backward_transfer(matrix) - 1e-9


@few
@given(matrices)
def test_average_accuracy_is_what_was_learned_and_what_became_of_it(matrix):
    # Σ_i Acc[T, i] = Σ_i Acc[i, i] + (T − 1)·BWT, as the last task has no later stage.
    tasks = len(matrix)
    kept = learned_accuracy(matrix) + (tasks - 1) / tasks * backward_transfer(matrix)
    assert average_accuracy(matrix) == pytest.approx(kept)


def test_one_stage_has_an_accuracy_but_nothing_to_forget():
    assert average_accuracy([[70.0]]) == learned_accuracy([[70.0]]) == 70
    for metric in (forgetting, backward_transfer):
        with pytest.raises(DataError, match="matrix: has 1 stage; expected at least 2"):
            metric([[70.0]])


@pytest.mark.parametrize("metric", ALL)
@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([], "matrix: has shape"),
        ([[1.0, 2.0]], r"matrix: has shape \(1, 2\); expected a row a stage and as many tasks"),
        ([[1.0], [1.0, 2.0]], "matrix: not an array of numbers"),
        ([[1.0, 2.0], [np.nan, 2.0]], r"matrix\[1\]\[0\] is nan"),
        ([[np.nan, 2.0], [1.0, 2.0]], r"matrix\[0\]\[0\] is nan"),
        ([[1.0, np.inf], [1.0, 2.0]], r"matrix\[0\]\[1\] is inf"),
        ([[1.0, -2.0], [1.0, 2.0]], r"matrix\[0\]\[1\] is -2.0; expected a score in per cent, at least 0"),
    ],
)
def test_a_matrix_that_is_none_is_refused(metric, matrix, message):
    with pytest.raises(DataError, match=message):
        metric(matrix)
