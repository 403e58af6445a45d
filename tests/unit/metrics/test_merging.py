import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiplora.errors import ConfigError, DataError
from hiplora.metrics import (
    DEFAULT_TAU,
    DEFAULT_TAUS,
    mean_post_merge_drop,
    merge_fail,
    merge_fail_table,
    merge_failures,
)

few = settings(max_examples=50, deadline=None, derandomize=True, database=None)

SINGLE = [{"a": 80.0, "b": 50.0}, {"a": 80.0, "c": 20.0}, {"b": 50.0, "c": 20.0}, {"a": 10.0, "b": 10.0}]
MERGED = [{"a": 72.0, "b": 45.0}, {"a": 79.0, "c": 17.9}, {"b": 52.0, "c": 18.5}, {"a": 9.9, "b": 4.0}]
# Smallest merged/single of each: 0.9 (both), 0.895 (c), 0.925 (c), 0.4 (b).

tables = st.lists(
    st.dictionaries(st.sampled_from("abcd"), st.floats(0, 100), min_size=1), min_size=1, max_size=6
)


@st.composite
def merges(draw):
    single = draw(tables)
    return [{task: draw(st.floats(0, 100)) for task in table} for table in single], single


def test_a_merge_fails_if_any_of_its_tasks_falls_below_the_threshold():
    assert merge_failures(MERGED, SINGLE, DEFAULT_TAU).tolist() == [False, True, False, True]
    assert merge_fail(MERGED, SINGLE, 0.9) == 0.5


def test_the_table_has_every_threshold():
    assert merge_fail_table(MERGED, SINGLE, (0.4, 0.5, 0.9, 0.91, 1.0)) == {
        0.4: 0.0,
        0.5: 0.25,
        0.9: 0.5,
        0.91: 0.75,
        1.0: 1.0,
    }
    assert tuple(merge_fail_table(MERGED, SINGLE)) == DEFAULT_TAUS
    assert DEFAULT_TAU in DEFAULT_TAUS


@few
@given(merges())
def test_a_stricter_threshold_never_fails_fewer(case):
    shares = list(merge_fail_table(*case).values())
    assert shares == sorted(shares)
    assert 0 <= shares[0] <= shares[-1] <= 1


@few
@given(tables, st.floats(0.01, 1))
def test_a_merge_that_changes_nothing_never_fails(single, tau):
    assert merge_fail(single, single, tau) == 0
    assert mean_post_merge_drop(single, single) == 0


def test_a_score_on_the_threshold_passes_whatever_the_rounding():
    assert 55.0 < 0.55 * 100.0  # what floating point makes of 55 = 55
    assert merge_fail([{"a": 55.0}], [{"a": 100.0}], 0.55) == 0
    assert merge_fail([{"a": 54.999999}], [{"a": 100.0}], 0.55) == 1


def test_a_task_that_scored_nothing_alone_cannot_fail():
    assert merge_fail([{"a": 0.0}, {"a": 0.0}], [{"a": 0.0}, {"a": 0.1}], 1.0) == 0.5


def test_the_mean_drop_is_over_all_metrics_and_absolute():
    # |80 − 70| + |50 − 56| + |20 − 20| = 16 over three metrics: the gain of 6 counts as a change of 6.
    single, merged = {"a": 80.0, "b": 50.0, "c": 20.0}, {"a": 70.0, "b": 56.0, "c": 20.0}
    assert mean_post_merge_drop(merged, single) == pytest.approx(16 / 3)
    assert mean_post_merge_drop([merged], [single]) == pytest.approx(16 / 3)


def test_every_metric_weighs_the_same_in_merges_of_different_sizes():
    single = [{"a": 10.0, "b": 10.0, "c": 10.0}, {"a": 10.0}]
    merged = [{"a": 8.0, "b": 8.0, "c": 8.0}, {"a": 0.0}]
    assert mean_post_merge_drop(merged, single) == pytest.approx((2 + 2 + 2 + 10) / 4)


@pytest.mark.parametrize("tau", [0.0, -0.5, 1.0001, 90, float("nan")])
def test_a_threshold_outside_0_to_1_is_refused(tau):
    with pytest.raises(ConfigError, match=r"tau is .*; expected a threshold in \(0, 1\]"):
        merge_fail(MERGED, SINGLE, tau)


@pytest.mark.parametrize(
    ("merged", "single", "message"),
    [
        ([], [], "merged has 0 merges, single has 0"),
        (MERGED, SINGLE[:3], "merged has 4 merges, single has 3"),
        (
            [{"a": 1.0}],
            [{"a": 1.0, "code": 1.0}],
            r"merged\[0\]: task 'code' is missing, and single\[0\] has it",
        ),
        ([{"a": 1.0, "x": 1.0}], [{"a": 1.0}], r"single\[0\]: task 'x' is missing, and merged\[0\] has it"),
        ([{"a": 1.0}, {}], [{"a": 1.0}, {}], r"merged\[1\]: is {}"),
        ([{"a": float("nan")}], [{"a": 1.0}], r"merged\[0\]\['a'\] is nan"),
        (
            [{"a": 1.0}],
            [{"a": -3.0}],
            r"single\[0\]\['a'\] is -3.0; expected a score in per cent, at least 0",
        ),
        ({"a": 1.0}, {"a": 1.0}, r"merged\[0\]: is 'a'; expected a mapping"),
    ],
)
def test_merges_that_cannot_be_compared_are_named(merged, single, message):
    with pytest.raises(DataError, match=message):
        merge_fail(merged, single, 0.9)


def test_so_are_drops():
    with pytest.raises(DataError, match=r"merged\[0\]: task 'b' is missing"):
        mean_post_merge_drop({"a": 1.0}, {"a": 1.0, "b": 1.0})
    with pytest.raises(DataError, match="merged has 0 merges"):
        mean_post_merge_drop([], [])
