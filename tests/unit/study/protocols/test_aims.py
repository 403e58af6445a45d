"""The aims against measurements made by hand."""

import json

import pytest

from hiplora.reporting.study.spec import Measurement, Section
from hiplora.reporting.study.write import write_report
from hiplora.study.protocols import aims
from tests.unit.study.protocols.made import made_study, results

AIMS = "protocols={aims: {reference: hiplora, plain: [lora, lora-mlp], attention: lora}}"
EQUAL = {"text": "German", "operating": True, "state": "reached", "over": "HiP-LoRA"}
ADDED = {"rule": "addition", "tau": 0.9, "size": "all", "merges": 30}


def of(protocol, metric, method, value, low=None, high=None, **more):
    return Measurement(protocol, method, metric, value, low=low, high=high, **more)


def drift(method, value, low, high, **setting):
    """How many times as far a method drifts as HiP-LoRA."""
    metric = "drift ratio at equal loss"
    return of(
        "frontier", metric, method, value, low, high, domain="mathematics", setting={**EQUAL, **setting}
    )


def judged(tmp_path, *measurements, changes=(AIMS,)):
    """Aim → part → what was found, as the file has it."""
    study, store = made_study(tmp_path, *changes)
    section = Section("frontier", "Made", measurements=measurements)
    (text,) = aims.files(study, study.recipe.protocols.aims, results(store), [section]).values()
    return json.loads(text)["aims"]


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (11.0, 20.0, "met"),
        (10.0, 20.0, "met"),
        (2.0, 9.0, "missed"),
        (9.0, 20.0, "cannot tell"),
        (None, None, "cannot tell"),
    ],
)
def test_an_aim_is_met_where_the_whole_interval_is_on_its_side(tmp_path, low, high, verdict):
    found = judged(tmp_path, drift("LoRA", 12.5, low, high))["drift"]["GSM8K"]
    assert found["verdict"] == verdict
    assert (found["estimate"], found["against"]) == (pytest.approx(0.08), "LoRA")
    assert found["high"] == (None if low is None else pytest.approx(1 / low))


def test_a_verdict_is_of_so_far_while_the_section_waits_for_jobs(tmp_path):
    study, store = made_study(tmp_path, AIMS)
    settings = study.recipe.protocols.aims
    for missing, verdict in (["train PiSSA"], "met so far"), ([], "met"):
        section = Section("frontier", "Made", measurements=[drift("LoRA", 50, 40, 60)], missing=missing)
        (text,) = aims.files(study, settings, results(store), [section]).values()
        assert json.loads(text)["aims"]["drift"]["GSM8K"]["verdict"] == verdict
        shown = aims.section_after(study, settings, results(store), [section])
        assert verdict in shown.text[0]
        assert json.loads(text)["aims"]["forgetting"]["accuracy"]["verdict"] == "not measured"


def test_the_lora_with_the_smaller_value_counts(tmp_path):
    found = judged(tmp_path, drift("LoRA", 50, 40, 60), drift("LoRA on the MLPs", 5, 4, 6))
    assert found["drift"]["GSM8K"]["verdict"] == "missed"
    assert found["drift"]["GSM8K"]["against"] == "LoRA on the MLPs"
    assert found["drift-attention"]["GSM8K"]["verdict"] == "met"
    assert found["drift-attention"]["GSM8K"]["against"] == "LoRA"


def test_a_lora_that_never_learned_as_much_counts_only_alone(tmp_path):
    weak = drift("LoRA on the MLPs", 5, 4, None, state="not reached")
    found = judged(tmp_path, drift("LoRA", 50, 40, 60), weak)
    assert (found["drift"]["GSM8K"]["verdict"], found["drift"]["GSM8K"]["against"]) == ("met", "LoRA")
    (tmp_path / "alone").mkdir()
    alone = judged(tmp_path / "alone", weak)["drift"]["GSM8K"]
    assert (alone["verdict"], alone["low"]) == ("cannot tell", None)


@pytest.mark.parametrize("setting", [{"operating": False}, {"text": "all texts"}, {"over": "PiSSA"}])
def test_other_points_and_means_over_texts_do_not_count(tmp_path, setting):
    found = judged(tmp_path, drift("LoRA", 50, 40, 60, **setting))
    assert found["drift"]["measured"]["verdict"] == "not measured"


def test_a_ratio_may_be_measured_either_way_round(tmp_path):
    there = of(
        "continual", "forgetting ratio", "LoRA", 8, 5, 12, form="accuracy", setting={"over": "HiP-LoRA"}
    )
    here = of(
        "continual",
        "forgetting ratio",
        "HiP-LoRA",
        0.5,
        0.3,
        0.7,
        form="likelihood",
        setting={"over": "LoRA"},
    )
    found = judged(tmp_path, there, here)["forgetting"]
    assert (found["accuracy"]["verdict"], found["accuracy"]["estimate"]) == ("met", 0.125)
    assert (found["likelihood"]["verdict"], found["likelihood"]["estimate"]) == ("missed", 0.5)


def test_forgetting_over_none_at_all_cannot_be_told(tmp_path):
    nothing = of(
        "continual", "forgetting ratio", "HiP-LoRA", float("inf"), form="accuracy", setting={"over": "LoRA"}
    )
    found = judged(tmp_path, nothing)["forgetting"]["accuracy"]
    assert (found["verdict"], found["estimate"]) == ("cannot tell", None)


@pytest.mark.parametrize(
    ("protocol", "aim"), [("merging", "merged-drift"), ("merge-fail", "merged-drift-drawn")]
)
def test_of_several_texts_the_worst_counts_and_the_calibrating_one_does_not(tmp_path, protocol, aim):
    texts = {"prose": (0.5, 0.4, 0.6), "code": (0.05, 0.04, 0.06)}
    made = [
        of(
            protocol,
            "drift ratio",
            "HiP-LoRA",
            *values,
            setting={"rule": "addition", "text": t, "over": "LoRA"},
        )
        for t, values in texts.items()
    ]
    assert judged(tmp_path, *made)[aim]["measured"]["verdict"] == "missed"
    own = "methods.hiplora.method={name: hiplora, r: 4, calibration_text: wikitext2_raw_valid.jsonl}"
    found = judged(tmp_path, *made, changes=(AIMS, own))[aim]["measured"]
    assert (found["verdict"], found["estimate"]) == ("met", 0.05)


@pytest.mark.parametrize(("merges", "verdict"), [(60, "cannot tell"), (80, "met")])
def test_no_failure_among_a_few_merges_does_not_show_that_few_fail(tmp_path, merges, verdict):
    none = of(
        "merge-fail", "merge fail", "HiP-LoRA", 0, 0, 0, form="accuracy", setting={**ADDED, "merges": merges}
    )
    found = judged(tmp_path, none)["merge-fail"]
    assert found["accuracy"]["verdict"] == verdict
    assert found["accuracy"]["high"] == pytest.approx(100 * (1 - 0.025 ** (1 / merges)))
    assert found["likelihood"]["verdict"] == "not measured"


def test_loras_own_merges_are_judged_by_the_lora_that_fails_least(tmp_path):
    made = [
        of("merge-fail", "merge fail", name, value, value - 5, value + 5, form="accuracy", setting=ADDED)
        for name, value in (("LoRA", 80), ("LoRA on the MLPs", 30))
    ]
    found = judged(tmp_path, *made)["merge-fail-lora"]["accuracy"]
    assert (found["verdict"], found["against"]) == ("missed", "LoRA on the MLPs")


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(-9, 1, "met"), (1, 9, "met"), (-9, -1, "missed"), (None, None, "cannot tell")],
)
def test_edits_succeed_as_often_unless_the_interval_says_fewer(tmp_path, low, high, verdict):
    setting = {"mode": "batch", "set": "edit-set", "minus": "LoRA"}
    found = judged(
        tmp_path, of("editing", "edit success difference", "HiP-LoRA", -1, low, high, setting=setting)
    )
    assert found["edit-success"]["edit-set"]["verdict"] == verdict


@pytest.mark.parametrize(("edits", "least"), [(80, -4.5), (120, -3.0)])
def test_edits_that_all_agree_leave_a_difference_possible(tmp_path, edits, least):
    setting = {"mode": "batch", "set": "edit-set", "minus": "LoRA"}
    same = of("editing", "edit success difference", "HiP-LoRA", 0, 0, 0, setting=setting, items=edits)
    found = judged(tmp_path, same)["edit-success"]["edit-set"]
    assert (found["verdict"], found["low"]) == ("met", pytest.approx(least, abs=0.05))


def test_a_difference_is_missed_only_where_the_seeds_say_so_too(tmp_path):
    setting = {"minus": "LoRA"}
    for sd, verdict, low in ((0.1, "missed", -3.0), (1.0, "met", -2 - 4.3027 / 3**0.5)):
        (tmp_path / verdict).mkdir()
        less = of("continual", "learned accuracy difference", "HiP-LoRA", -2, -3, -1, form="accuracy",
                  setting=setting, seeds=3, sd=sd)  # fmt: skip
        found = judged(tmp_path / verdict, less)["continual-learned"]["accuracy"]
        assert (found["verdict"], found["low"]) == (verdict, pytest.approx(low, abs=1e-3))


def test_a_difference_may_be_measured_either_way_round(tmp_path):
    setting = {"mode": "batch", "set": "edit-set", "minus": "HiP-LoRA"}
    found = judged(tmp_path, of("editing", "edit success difference", "LoRA", 5, 1, 9, setting=setting))
    shown = found["edit-success"]["edit-set"]
    assert (shown["verdict"], shown["estimate"], shown["low"], shown["high"]) == ("missed", -5, -9, -1)


@pytest.mark.parametrize(
    ("protocol", "metric", "aim", "setting"),
    [
        ("merging", "score alone difference", "merged-learned", {"rule": "addition"}),
        ("continual", "learned accuracy difference", "continual-learned", {}),
    ],
)
def test_less_drift_of_a_method_that_learned_less_is_told(tmp_path, protocol, metric, aim, setting):
    less = of(
        protocol, metric, "HiP-LoRA", -8, -12, -4, form="likelihood", setting={**setting, "minus": "LoRA"}
    )
    more = of(protocol, metric, "LoRA on the MLPs", -3, -5, -1, form="likelihood",
              setting={**setting, "minus": "HiP-LoRA"})  # fmt: skip
    shown = judged(tmp_path, less, more)[aim]["likelihood"]
    assert (shown["verdict"], shown["estimate"], shown["against"]) == ("missed", -8, "LoRA")


@pytest.mark.parametrize(
    ("share", "everywhere", "verdict"),
    [(0.0, 0, "met"), (0.5, 0, "met"), (0.5, 1, "cannot tell"), (1.0, 2, "cannot tell"), (1.0, 3, "missed")],
)
def test_a_rival_that_lies_below_everywhere_misses_the_aim_if_all_seeds_say_so(
    tmp_path, share, everywhere, verdict
):
    def below(method, value, count, kind="rival"):
        setting = {"than": "HiP-LoRA", "kind": kind, "everywhere": count}
        return of("frontier", "share of losses below", method, value, domain="code", seeds=3, setting=setting)

    made = [
        below("PiSSA", share, everywhere),
        below("MiLoRA", 0.0, 0),
        below("HiP-LoRA (activation)", 1.0, 3, "own"),
        below("LoRA", 1.0, 3, "plain"),
    ]
    assert judged(tmp_path, *made)["rivals"]["Code"]["verdict"] == verdict


def test_the_section_shows_aim_target_value_and_verdict(tmp_path):
    study, store = made_study(tmp_path, AIMS)
    made = Section("frontier", "Made", measurements=[drift("LoRA", 5, 4, 6)])
    section = aims.section_after(study, study.recipe.protocols.aims, results(store), [made])
    name, cells = section.tables[0].rows[0]
    assert name == "Single-task drift at equal loss"
    texts = [cell.text for cell in cells]
    assert texts == ["missed", "GSM8K", "", "of LoRA's", "≤ 1/10 of the best plain LoRA's", "LoRA"]
    assert cells[2].value == pytest.approx(0.2)
    assert section.text[1].startswith("Missed: Single-task drift at equal loss (GSM8K)")
    assert "Aim by aim" in write_report(tmp_path / "report", "Made", {}, [section], {}).read_text()


def test_what_the_recipe_plans_is_told_before_it_is_measured(tmp_path):
    """Drift where a plain LoRA is among a domain's methods, rivals where a rival is."""
    plan = (
        "protocols={aims: {reference: hiplora, plain: [lora]}, frontier: {domains: {mathematics: [hiplora, lora], "
        "code: [hiplora, pissa]}, rates: [0.001, 0.002, 0.004, 0.008], plain: [lora], reference: hiplora}}"
    )
    found = judged(tmp_path, drift("LoRA", 50, 40, 60), changes=(plan,))
    assert {part for part in found["drift"] if part not in ("says", "target")} == {"GSM8K"}
    assert found["rivals"]["Code"]["verdict"] == "not measured"
    assert "GSM8K" not in found["rivals"]


@pytest.mark.parametrize(
    ("tasks", "planned"), [("{}", {"GSM8K", "Code"}), ("{gsm8k_reference: 4}", {"GSM8K"})]
)
def test_drift_at_equal_likelihood_is_planned_where_the_own_task_is_scored(tmp_path, tasks, planned):
    plan = (
        "protocols={aims: {reference: hiplora, plain: [lora]}, frontier: {domains: {mathematics: [hiplora, lora], "
        f"code: [hiplora, lora]}}, rates: [0.001, 0.002], tasks: {tasks}, plain: [lora], reference: hiplora}}}}"
    )
    found = judged(tmp_path, changes=(plan,))
    assert set(found["drift-score"]) - {"says", "target"} == planned
    assert set(found["drift"]) - {"says", "target"} == {"GSM8K", "Code"}


def test_without_an_attention_lora_there_is_no_aim_on_it(tmp_path):
    changes = ("protocols={aims: {reference: hiplora, plain: [lora]}}",)
    assert "drift-attention" not in judged(tmp_path, changes=changes)
