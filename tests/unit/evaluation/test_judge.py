import numpy as np
import pytest

from hiplora.evaluation.evaluate import collect, judge


def test_scores_without_chance_give_verdicts_without_doubt():
    """Task `a` falls from 100 to 60, `b` from 50 to 49: fails where τ > 0.6; drops of 40 and 1."""
    one = ({"a": [100.0] * 4, "b": [50.0] * 4}, {"a": [60.0] * 4, "b": [49.0] * 4})
    found = judge([one])
    assert found["mean_drop"] == pytest.approx({"estimate": 20.5, "low": 20.5, "high": 20.5})
    for tau, row in found["merge_fail"].items():
        assert row["estimate"] == row["low"] == row["high"] == row["share"] == (1.0 if float(tau) > 0.6 else 0.0)


def test_merge_fail_is_the_share_of_merges_with_any_task_below():
    good = ({"a": [100.0], "b": [100.0]}, {"a": [95.0], "b": [95.0]})
    bad = ({"a": [100.0], "b": [100.0]}, {"a": [100.0], "b": [50.0]})
    assert judge([good, bad])["merge_fail"]["0.9"]["estimate"] == 0.5


def test_the_interval_knows_how_uncertain_the_items_leave_it():
    """Before 50 %, after 45 %: exactly at τ = 0.9 on these items, and below it in about half of the redrawn ones."""
    generator = np.random.default_rng(0)
    before = generator.permutation([100.0, 0.0] * 100)
    after = before.copy()
    after[np.flatnonzero(before)[:10]] = 0.0
    found = judge([({"a": before}, {"a": after})])["merge_fail"]["0.9"]
    assert found["estimate"] == 0.0
    assert (found["low"], found["high"]) == (0.0, 1.0)
    assert 0.3 < found["share"] < 0.7


def test_the_same_items_stay_paired():
    """The same score before and after, item by item, is no drop in any replicate, however the items vary."""
    items = list(np.random.default_rng(1).uniform(0, 100, 50))
    found = judge([({"a": items}, {"a": items})])
    assert found["mean_drop"] == {"estimate": 0.0, "low": 0.0, "high": 0.0}


def collected(base, other):
    """The difference of two runs of a task by their items' scores, and the first run's own mean."""
    names = {"metric": "acc", "form": "likelihood", "others": {}}
    runs = {n: {"t": {**names, "score": items, "likelihood": None}} for n, items in (("a", base), ("b", other))}
    found = collect({"t": {}}, runs)
    return found["differences"]["t"]["score"][0], found["runs"]["a"]["t"]["score"]


@pytest.mark.parametrize(("count", "unseen"), [(1, 0.975), (4, 0.602), (400, 0.0092)])
def test_items_that_all_agree_have_an_interval_that_narrows_with_their_number(count, unseen):
    difference, mean = collected([100.0] * count, [100.0] * count)
    assert (mean["estimate"], mean["high"]) == (100, 100)
    assert mean["low"] == pytest.approx(100 - 100 * unseen, abs=0.1)
    assert (difference["low"], difference["high"]) == pytest.approx((-100 * unseen, 100 * unseen), abs=0.1)


@pytest.mark.parametrize(
    ("base", "other", "verdict"),
    [
        ([0.0, 100.0] * 300, [0.0, 100.0] * 300, "kept"),
        ([0.0, 100.0] * 300, [0.0, 0.0] * 300, "lost"),
        ([0.0, 100.0] * 300, [100.0, 100.0] * 300, "kept"),
        ([0.0, 100.0] * 5, [0.0, 100.0] * 4 + [100.0, 0.0], "cannot tell"),
        ([0.0, 100.0] * 2, [0.0, 100.0] * 2, "cannot tell"),
    ],
)
def test_a_verdict_says_lost_only_where_it_is_sure_and_kept_only_within_a_point(base, other, verdict):
    assert collected(base, other)[0]["verdict"] == verdict
