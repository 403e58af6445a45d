"""The paper's claims against measurements made by hand."""

import json
import math

import pandas as pd
import pytest
from scipy import stats

from hiplora.study.protocols.claims import holm
from hiplora.study.records import Findings
from tests.unit.study.protocols.by_hand import study_of

NAMES = {"metric": "retain difference", "method": "HiP-LoRA (paper)", "minus": "LoRA"}
RETAIN = {**NAMES, "form": "accuracy", "estimate": -3.0, "low": -4.0, "high": -2.0}


def judged(tmp_path, *rows, claim="retain", form="accuracy", section="single-task"):
    """The verdict on a claim from a section's measurements."""
    study, _ = study_of(tmp_path, "claims: {hiplora: hiplora, lora: lora}")
    findings = study.recipe.protocols.claims.judge(study, [Findings(pd.DataFrame(rows), name=section)])
    assert set(findings.tables[""][1].Verdict) >= {"not measured"}
    return json.loads(findings.files["claims.json"])["claims"][claim][form]


DOWNSTREAM = {"metric": "mean score difference", "estimate": -0.2, "low": -0.9, "high": 0.5}  # margin: a point


@pytest.mark.parametrize(
    ("claim", "change", "verdict", "as_large"),
    [
        ("retain", {"estimate": -5.0, "low": -9.0, "high": -1.0}, "supported", "possible"),
        ("retain", {"estimate": 5.0, "low": 1.0, "high": 9.0}, "not supported", "excluded"),
        ("retain", {"estimate": 4.0, "low": -1.0, "high": 9.0}, "cannot tell", "excluded"),
        ("retain", {"estimate": 4.0, "low": None, "high": None}, "cannot tell", "–"),
        ("retain", {"form": "other"}, "not measured", "–"),
        ("downstream", DOWNSTREAM, "supported", "–"),
        ("downstream", {**DOWNSTREAM, "low": -1.1}, "cannot tell", "–"),
    ],
)
def test_a_claim_is_judged_by_the_side_of_its_interval(tmp_path, claim, change, verdict, as_large):
    claimed = judged(tmp_path, {**RETAIN, **change}, claim=claim)
    assert (claimed["verdict"], claimed["as_large"]) == (verdict, as_large)


@pytest.mark.parametrize("seeds", [3, 5])
def test_the_test_is_students_where_the_interval_is(tmp_path, seeds):
    row = {**RETAIN, "estimate": -2.0, "low": -3.0, "high": -1.0, "seeds": seeds}
    over_items = judged(tmp_path, {**row, "sd": 0.1})["p"]
    assert over_items == pytest.approx(8.9e-5, rel=0.01)
    width = stats.t.ppf(0.975, seeds - 1)
    over_seeds = judged(tmp_path, {**row, "sd": seeds**0.5 / width})["p"]
    assert over_seeds == pytest.approx(2 * stats.t.sf(2 * width, seeds - 1))


def test_a_row_that_one_test_would_support_is_corrected_for_the_number_of_rows(tmp_path):
    row = {**RETAIN, "low": -5.9, "high": -0.1}
    assert judged(tmp_path, row)["verdict"] == "supported"
    others = [{**row, "form": "likelihood"}]
    assert judged(tmp_path, row, *others)["verdict"] == "cannot tell"
    assert holm(pd.Series([0.01, math.nan, 0.04, 0.03]))[0::2].tolist() == pytest.approx([0.03, 0.06])


@pytest.mark.parametrize(("gain", "verdict"), [(0.1, "not exercised"), (2.0, "supported")])
def test_claims_about_gains_that_did_not_move_are_not_exercised(tmp_path, gain, verdict):
    label = {"method": "HiP-LoRA (paper)", "type": "all"}
    row = {**label, "metric": "gain correlation", "estimate": -0.5, "low": -0.7, "high": -0.3}
    moved = {**label, "metric": "median relative gain", "estimate": gain}
    claimed = judged(tmp_path, row, moved, claim="allocation", form="measured", section="allocation")
    assert claimed["verdict"] == verdict
