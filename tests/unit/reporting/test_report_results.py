import math

import pytest

from hiplora.errors import DataError
from hiplora.reporting.results import read_inspection, read_results
from tests.unit.reporting import report_samples as samples


def test_a_full_result_is_read_whole():
    results = read_results(samples.demo_results())
    hip = results.methods[1]
    assert [method.name for method in results.methods] == ["LoRA", "HiP-LoRA"]
    assert hip.loss_after == 1.427
    assert hip.drift[0].text == "built-in prose"
    assert hip.drift[0].kl == pytest.approx(0.0124)
    assert len(hip.modules) == 120
    assert hip.modules[5].layer == 1
    assert hip.modules[5].type == "k_proj"
    assert results.edits[1].alone == {"capitals": 1.0, "inventions": 1.0}
    assert results.edits[1].survival == 0.844
    assert results.base_success == {"capitals": 0.0625, "inventions": 0.0}


@pytest.mark.parametrize("kind", ["compare", "demo"])
def test_every_section_may_be_absent(kind):
    results = read_results({"schema": 1, "kind": kind})
    assert results.methods == ()
    assert results.edits == ()
    assert results.title


@pytest.mark.parametrize("junk", [None, math.nan, 3, "text", [], [None], {"": None}])
def test_sections_of_another_shape_read_as_absent(junk):
    raw = {
        "schema": 1,
        "kind": "demo",
        "methods": junk,
        "edits": junk,
        "data": junk,
        "settings": junk,
        "provenance": junk,
    }
    results = read_results(raw)
    assert all(method.loss_after is None and not method.modules for method in results.methods)
    assert results.edits == ()
    row = dict.fromkeys(("curve", "drift", "allocation", "trainable_parameters", "seconds"), junk)
    method = read_results({"schema": 1, "kind": "compare", "methods": {"LoRA": row}}).methods[0]
    assert method.curve == ()
    assert all(drift.kl is None for drift in method.drift)


def test_points_of_a_curve_without_a_number_are_left_out():
    raw = samples.compare_results()
    raw["methods"]["LoRA"]["curve"] = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": math.nan},
        {"step": 3},
        None,
    ]
    assert read_results(raw).methods[0].curve == ((1.0, 2.0),)


def test_the_type_of_a_module_is_its_last_name_where_it_is_not_given():
    raw = samples.inspection(modules=[{"module": "model.layers.3.mlp.up_proj", "layer": None}])
    assert read_inspection(raw).modules[0].type == "up_proj"


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ([], "list"),
        ({"kind": "compare"}, "schema None"),
        ({"schema": 2, "kind": "compare"}, "schema 2"),
        ({"schema": 1, "kind": "inspection"}, "'inspection'"),
        ({"schema": 1}, "kind None"),
    ],
)
def test_what_is_no_result_is_refused_by_name(raw, named):
    with pytest.raises(DataError, match=named):
        read_results(raw)


def test_a_result_is_no_inspection():
    with pytest.raises(DataError, match="'compare', expected 'inspection'"):
        read_inspection(samples.compare_results())
