"""The paper's claims against measurements made by hand."""

import json

import pytest

from hiplora.reporting.study.spec import Measurement, Section
from hiplora.reporting.study.write import write_report
from hiplora.study.protocols import claims, sections
from tests.unit.study.protocols.made import made_study, results, table

CHANGES = ("protocols={claims: {hiplora: hiplora, lora: lora}}",)


def retain(value, low, high, form="accuracy", method="HiP-LoRA", minus="LoRA", **more):
    return Measurement(
        "single-task",
        method,
        "retain difference",
        value,
        form=form,
        low=low,
        high=high,
        setting={"minus": minus},
        **more,
    )


def judged(tmp_path, *measurements):
    """Claim → form → what was found, as the file has it."""
    study, store = made_study(tmp_path, *CHANGES)
    section = Section("single-task", "Single tasks", measurements=measurements)
    settings = study.recipe.protocols.claims
    (text,) = claims.files(study, settings, results(store), [section]).values()
    return json.loads(text)["claims"]


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-9.0, -1.0, "supported"),
        (1.0, 9.0, "not supported"),
        (-1.0, 9.0, "cannot tell"),
        (None, None, "cannot tell"),
    ],
)
def test_a_claim_is_judged_by_the_side_of_its_interval(tmp_path, low, high, verdict):
    found = judged(tmp_path, retain(-3.0, low, high))
    assert found["retain"]["accuracy"] == {
        "verdict": verdict,
        "estimate": -3.0,
        "low": low,
        "high": high,
        "widest": [low, high],
        "unit": "pp",
        "paper_effect": pytest.approx(-7.4),
        "as_large": "–" if low is None else "excluded" if low > -7.4 else "possible",
    }


@pytest.mark.parametrize(("sd", "verdict"), [(0.5, "supported"), (5.0, "cannot tell")])
def test_a_claim_holds_over_seeds_too_or_it_cannot_be_told(tmp_path, sd, verdict):
    """Student's t with two degrees of freedom: 4.30 standard errors to each side."""
    found = judged(tmp_path, retain(-3.0, -4.0, -2.0, seeds=3, sd=sd))["retain"]["accuracy"]
    margin = 4.302653 * sd / 3**0.5
    assert found["verdict"] == verdict
    assert found["widest"] == pytest.approx([min(-4, -3 - margin), max(-2, -3 + margin)])


@pytest.mark.parametrize(
    ("more", "told"), [({"seeds": 3, "sd": 0.1}, "−3.25 to −2.75"), ({"seeds": 3}, "–"), ({}, "one seed")]
)
def test_the_interval_over_seeds_is_shown_where_there_is_one(tmp_path, more, told):
    study, store = made_study(tmp_path, *CHANGES)
    single = Section("single-task", "Single tasks", measurements=[retain(-3.0, -4.0, -2.0, **more)])
    section = claims.section_after(study, study.recipe.protocols.claims, results(store), [single])
    shown = next(cells for _, cells in section.tables[0].rows if cells[2].value == -3.0)
    assert shown[4].text == told


def test_merges_that_share_adapters_are_judged_by_the_papers_interval_too(tmp_path):
    study, store = made_study(tmp_path, *CHANGES)
    settings = study.recipe.protocols.claims
    for wide, verdict in ((-1.0, "supported"), (3.0, "cannot tell")):
        setting = {"minus": "LoRA", "rule": "addition", "hierarchical_low": -9.0, "hierarchical_high": wide}
        fewer = Measurement("merge-fail", "HiP-LoRA", "merge fail difference", -3, form="accuracy", low=-4, high=-2,
                            setting=setting)  # fmt: skip
        section = Section("merge-fail", "Merges", measurements=[fewer])
        (text,) = claims.files(study, settings, results(store), [section]).values()
        assert json.loads(text)["claims"]["merge-fail"]["accuracy"]["verdict"] == verdict


def test_what_was_not_measured_is_said(tmp_path):
    found = judged(tmp_path, retain(-3.0, -4.0, -2.0, form="likelihood"))
    assert found["retain"]["likelihood"]["verdict"] == "supported"
    assert found["retain"]["accuracy"]["verdict"] == "not measured"
    assert found["zero"]["measured"]["verdict"] == "not measured"


@pytest.mark.parametrize("other", [{"method": "LoRA"}, {"minus": "PiSSA"}])
def test_another_methods_measurement_does_not_count(tmp_path, other):
    found = judged(tmp_path, retain(-3.0, -4.0, -2.0, **other))
    assert found["retain"]["accuracy"]["verdict"] == "not measured"


def test_claims_on_methods_that_the_study_lacks_are_left_out(tmp_path):
    found = judged(tmp_path)
    assert "retain" in found
    assert not {"retain-proj", "retain-pissa", "adalora"} & set(found)


def test_the_section_shows_claim_effect_and_verdict(tmp_path):
    study, store = made_study(tmp_path, *CHANGES)
    single = Section("single-task", "Single tasks", measurements=[retain(-3.0, -4.0, -2.0)])
    section = claims.section_after(study, study.recipe.protocols.claims, results(store), [single])
    name = "HiP-LoRA loses less of the other abilities than LoRA"
    shown = [cells for row, cells in section.tables[0].rows if row == name]
    assert [cell.text for cell in shown[0]] == [
        *("supported", "accuracy", "", "pp", "one seed", "Retain 12.3 → 4.9", "excluded"),
    ]
    assert shown[0][2].value == -3.0
    assert "1 supported" in section.text[0]
    assert table(section, "claims")
    assert "Claim by claim" in write_report(tmp_path / "report", "Made", {}, [section], {}).read_text()


def test_the_verdicts_are_read_first(tmp_path):
    study, store = made_study(
        tmp_path, "protocols={single_task: {methods: [lora]}, claims: {hiplora: hiplora, lora: lora}}"
    )
    assert [one.name for one in sections(study, results(store))] == ["claims", "single-task"]


def test_speed_of_training_is_judged_and_shown_in_nats(tmp_path):
    study, store = made_study(tmp_path, *CHANGES)
    slower = Measurement("ablations", "Without stability budget", "training loss difference", 0.0021, low=0.0012,
                         high=0.003, sd=0.0002, seeds=3, setting={"minus": "HiP-LoRA"})  # fmt: skip
    found = Section("ablations", "Ablations", measurements=[slower])
    section = claims.section_after(study, study.recipe.protocols.claims, results(store), [found])
    cells = dict(section.tables[0].rows)["Without the stability budget training goes more slowly"]
    assert (cells[0].text, cells[2].digits, cells[4].text) == ("supported", 4, "+0.0016 to +0.0026")


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.96, 0.99, "supported"), (0.90, 0.94, "not supported")]
)
def test_overhead_is_judged_by_the_ratio_to_lora_that_the_paper_reports(tmp_path, low, high, verdict):
    ratio = Measurement("cost", "HiP-LoRA", "throughput ratio", (low + high) / 2, low=low, high=high,
                        setting={"over": "LoRA"})  # fmt: skip
    of_another = Measurement(
        "cost", "HiP-LoRA", "throughput ratio", 0.5, low=0.4, high=0.6, setting={"over": "PiSSA"}
    )
    study, store = made_study(tmp_path, *CHANGES)
    section = Section("cost", "Cost", measurements=[of_another, ratio])
    (text,) = claims.files(study, study.recipe.protocols.claims, results(store), [section]).values()
    assert json.loads(text)["claims"]["overhead"]["measured"]["verdict"] == verdict


def test_an_effect_of_the_papers_size_is_excluded_by_the_wider_interval(tmp_path):
    """Retain falls by 7.4 in the paper; other seeds may reach further than items."""
    narrow, wide = (
        judged(tmp_path, retain(-0.1, -0.2, 0.1, seeds=3, sd=sd))["retain"]["accuracy"] for sd in (0.1, 5)
    )
    assert (narrow["verdict"], narrow["as_large"]) == ("cannot tell", "excluded")
    assert (wide["verdict"], wide["as_large"]) == ("cannot tell", "possible")
    unknown = judged(tmp_path, retain(-3.0, -4.0, -2.0))["downstream"]["accuracy"]
    assert (unknown["paper_effect"], unknown["as_large"]) == (None, "–")


def test_a_few_merges_that_all_agree_exclude_little(tmp_path):
    """Of three merges that fail alike, the seven points of the paper cannot be excluded; of three hundred they can."""
    study, store = made_study(tmp_path, *CHANGES)
    for merges, excluded in ((3, "possible"), (300, "excluded")):
        setting = {"minus": "HiP-LoRA", "merges": merges}
        same = Measurement("ablations", "Without stability budget", "merge fail difference", 0.0, form="accuracy",
                           low=0.0, high=0.0, sd=0.0, seeds=3, setting=setting)  # fmt: skip
        section = Section("ablations", "Ablations", measurements=[same])
        (text,) = claims.files(study, study.recipe.protocols.claims, results(store), [section]).values()
        found = json.loads(text)["claims"]["budget-merge"]["accuracy"]
        assert (found["verdict"], found["as_large"]) == ("cannot tell", excluded)
        assert found["widest"][1] == -found["widest"][0] > 0
