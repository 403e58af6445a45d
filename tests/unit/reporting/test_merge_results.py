import math

import pytest

from hiplora.errors import DataError
from hiplora.reporting.merge_results import Interval, read_merge_report
from tests.unit.reporting import merge_samples as samples


def test_a_full_report_is_read_whole():
    report = read_merge_report(samples.merge_report(evaluation=samples.evaluation()))
    assert (report.base, report.method) == ("smollm2-135m", "addition")
    assert [adapter.name for adapter in report.adapters] == ["medicine", "law", "code"]
    assert len(report.modules) == 150
    assert (report.modules[5].layer, report.modules[5].type) == (1, "q_proj")
    assert [pair.adapters for pair in report.modules[0].pairs] == [(0, 1), (0, 2), (1, 2)]
    assert report.modules[0].worst.score == report.modules[0].score
    assert len(report.most_conflicting) == 10
    assert report.pairs["left"][0] == (None, 0.25, 0.25)
    assert report.totals["norm_ratio"] == 0.58
    assert report.evaluation.tasks[0].difference == Interval(-11.2, -15.1, -7.3)
    assert report.evaluation.merge_fail["0.9"].estimate == 0.25
    assert report.evaluation.mean_drop.high == 7.7


def test_means_of_a_module_leave_out_what_has_no_subspace():
    raw = samples.merge_report(layers=1)
    raw["modules"][0]["pairs"] = [
        samples.pair((0, 1), 0.2, 0.4, -0.5),
        {"adapters": [0, 2], "left": None, "right": None, "cosine": None, "score": None},
        samples.pair((1, 2), 0.4, 0.6, 0.1),
    ]
    row = read_merge_report(raw).modules[0]
    assert (row.left, row.right, row.cosine) == pytest.approx((0.3, 0.5, -0.2))
    assert row.largest_cosine == 1.0
    assert row.worst.adapters == (1, 2)


@pytest.mark.parametrize("junk", [None, math.nan, 3, "text", [], [None], {"": None}])
def test_sections_of_another_shape_read_as_absent(junk):
    keys = ("adapters", "modules", "most_conflicting", "pairs", "totals", "merge", "settings", "provenance")
    report = read_merge_report(
        {"schema": 1, "kind": "merge-report"} | dict.fromkeys((*keys, "evaluation"), junk)
    )
    assert all(not module.pairs and module.worst is None for module in report.modules)
    assert report.most_conflicting == ()
    assert not report.evaluation.tasks
    assert report.evaluation.mean_drop.estimate is None
    row = dict.fromkeys(("pairs", "adapters", "norm_ratio", "layer"), junk) | {"module": "a.b"}
    module = read_merge_report({"schema": 1, "kind": "merge-report", "modules": [row]}).modules[0]
    assert module.type == "b"
    assert all(pair.left.mean is None for pair in module.pairs)


def test_only_an_interval_on_one_side_of_zero_excludes_it():
    assert Interval(-1, -2, -0.5).excludes_zero
    assert Interval(1, 0.5, 2).excludes_zero
    assert not Interval(1, 0, 2).excludes_zero
    assert not Interval(1, None, None).excludes_zero


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ([], "merge report: expected a dictionary, got list"),
        ({"kind": "merge-report"}, "schema None"),
        ({"schema": 2, "kind": "merge-report"}, "schema 2"),
        ({"schema": 1, "kind": "merge"}, "'merge', expected 'merge-report'"),
    ],
)
def test_what_is_no_merge_report_is_refused_by_name(raw, named):
    with pytest.raises(DataError, match=named):
        read_merge_report(raw)
