"""The paper's claims against measurements made by hand."""

import json

import pandas as pd
import pytest

from hiplora.study.protocols import claims
from hiplora.study.records import Findings
from tests.unit.study.protocols.made import made_study

NAMES = {"metric": "retain difference", "method": "HiP-LoRA", "minus": "LoRA", "form": "accuracy"}
RETAIN = {**NAMES, "estimate": -3.0, "low": -4.0, "high": -2.0, "sd": None, "seeds": 1}


def judged(tmp_path, **changes):
    """The verdict on Retain by accuracy."""
    study, _ = made_study(tmp_path, "claims: {hiplora: hiplora, lora: lora}")
    single = Findings("single-task", "Single tasks", pd.DataFrame([{**RETAIN, **changes}]))
    found = claims.judge(study, study.recipe.protocols.claims, [single])
    assert list(found.tables["claims"][1].Verdict) != []
    return json.loads(found.files["claims.json"])["claims"]["retain"]["accuracy"]


@pytest.mark.parametrize(
    ("low", "high", "verdict", "as_large"),
    [
        (-9.0, -1.0, "supported", "possible"),
        (1.0, 9.0, "not supported", "excluded"),
        (-1.0, 9.0, "cannot tell", "excluded"),
        (None, None, "cannot tell", "–"),
    ],
)
def test_a_claim_is_judged_by_the_side_of_its_interval(tmp_path, low, high, verdict, as_large):
    found = judged(tmp_path, low=low, high=high)
    assert (found["verdict"], found["as_large"]) == (verdict, as_large)
    assert found["widest"] == [low, high]


@pytest.mark.parametrize(("sd", "verdict"), [(0.5, "supported"), (5.0, "cannot tell")])
def test_a_claim_holds_over_seeds_too_or_it_cannot_be_told(tmp_path, sd, verdict):
    found = judged(tmp_path, sd=sd, seeds=3)
    margin = 4.302653 * sd / 3**0.5  # Student's t with two degrees of freedom
    assert found["verdict"] == verdict
    assert found["widest"] == pytest.approx([min(-4, -3 - margin), max(-2, -3 + margin)])


def test_where_all_edits_agree_the_bounds_are_what_their_number_leaves_possible():
    low, high = claims.widest({"estimate": 0.0, "low": 0.0, "high": 0.0, "items": 20})
    assert (low, high) == (-high, pytest.approx(100 * (1 - 0.025 ** (1 / 20))))


def test_what_no_protocol_measured_is_not_measured(tmp_path):
    assert judged(tmp_path, form="other")["verdict"] == "not measured"
