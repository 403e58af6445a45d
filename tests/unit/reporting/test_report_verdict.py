import math

import pytest

from hiplora.reporting.results import read_inspection, read_results
from hiplora.reporting.verdict import contenders, inspection_verdict, verdict
from tests.unit.reporting import report_samples as samples

SAME = "HiP-LoRA and LoRA did about the same:"
LORA_WON = "LoRA did better here: HiP-LoRA"


def compare(hip_loss, hip_kl, lora_loss=1.4, lora_kl=0.08, **names):
    methods = {
        names.get("base", "LoRA"): {
            "heldout_loss_before": 2.4,
            "heldout_loss_after": lora_loss,
            "drift": samples.drift(lora_kl),
        },
        names.get("ours", "HiP-LoRA"): {
            "heldout_loss_before": 2.4,
            "heldout_loss_after": hip_loss,
            "drift": samples.drift(hip_kl),
        },
    }
    return verdict(read_results({"schema": 1, "kind": "compare", "methods": methods}))


def merged(hip, lora, count=16):
    """Verdict for (alone, merged overall, survival, KL) of both methods, over two sets of `count` edits."""
    methods = {
        name: samples.edit_method({"a": alone, "b": alone}, {"a": overall, "b": overall}, survival, kl)
        for name, (alone, overall, survival, kl) in {"LoRA": lora, "HiP-LoRA": hip}.items()
    }
    edits = {"sets": [{"name": "a", "count": count}, {"name": "b", "count": count}], "methods": methods}
    return verdict(read_results({"schema": 1, "kind": "demo", "edits": edits}))


@pytest.mark.parametrize(
    ("loss", "kl", "headline"),
    [
        (1.40, 0.010, "HiP-LoRA learned as much as LoRA and drifted 8.0 times less from the base model."),
        (1.43, 0.064, "HiP-LoRA learned as much as LoRA and drifted 20 % less from the base model."),
        (1.20, 0.010, "HiP-LoRA learned more than LoRA and drifted 8.0 times less from the base model."),
        (1.70, 0.010, "HiP-LoRA learned less than LoRA but drifted 8.0 times less from the base model."),
        (1.20, 0.100, "HiP-LoRA learned more than LoRA but drifted 25 % further from the base model."),
        (1.40, 0.320, f"{LORA_WON} learned as much as LoRA and drifted 4.0 times as far from the base model."),
        (1.70, 0.100, f"{LORA_WON} learned less than LoRA and drifted 25 % further from the base model."),
        (1.70, 0.080, f"{LORA_WON} learned less than LoRA and drifted about as far from the base model."),
        (1.41, 0.083, f"{SAME} no difference in learning or drift that one run can show."),
    ],
)  # fmt: skip
def test_the_headline_of_a_comparison_names_who_did_better(loss, kl, headline):
    assert compare(loss, kl).headline.replace("\u00a0", " ") == headline


def test_the_verdict_says_how_many_texts_agree_and_what_happened_to_perplexity():
    sentence = compare(1.4, 0.01).sentences[1].replace("\u00a0", " ")
    assert "0.0150 nats per token (KL divergence) with HiP-LoRA and by 0.120 with LoRA" in sentence
    assert "HiP-LoRA moved less on 3 of 3" in sentence
    assert "+1.4 % and +11.1 %" in sentence


def test_drift_is_compared_on_the_texts_that_both_have():
    raw = samples.compare_results()
    raw["methods"]["LoRA"]["drift"] = {"shared": {"kl": 0.2}, "only LoRA's": {"kl": 90.0}}
    raw["methods"]["HiP-LoRA"]["drift"] = {"shared": {"kl": 0.1}}
    assert "drifted 2.0 times less" in verdict(read_results(raw)).headline


@pytest.mark.parametrize("missing", [None, math.nan])
def test_what_was_not_measured_is_said(missing):
    assert compare(missing, 0.01).headline.endswith("held-out loss was not measured.")
    assert compare(1.4, math.nan).headline == "HiP-LoRA learned as much as LoRA; drift was not measured."
    assert compare(missing, math.nan).headline.endswith("neither loss nor drift was measured.")


def test_no_drift_at_all_needs_no_ratio():
    assert (
        compare(1.4, 0.0).headline
        == "HiP-LoRA learned as much as LoRA and did not drift from the base model at all."
    )
    assert "which the other did not" in compare(1.4, 0.01, lora_kl=0.0).headline


def test_one_method_alone_is_described_without_a_rival():
    raw = samples.compare_results()
    del raw["methods"]["LoRA"]
    headline = verdict(read_results(raw)).headline
    assert headline == (
        "HiP-LoRA took the held-out loss from 2.414 to 1.427 "
        "and drifted 0.0186 nats per token from the base model on other text."
    )
    assert verdict(read_results({"schema": 1, "kind": "compare"})).headline == "Nothing was measured."


def test_further_methods_are_named_with_their_numbers():
    raw = samples.compare_results()
    raw["methods"]["PiSSA"] = {"heldout_loss_after": 1.3, "drift": {"text": {"kl": 0.5}}}
    assert verdict(read_results(raw)).sentences[-1] == "PiSSA: held-out loss 1.300, KL divergence 0.500."


@pytest.mark.parametrize(
    ("names", "pair"),
    [
        (["LoRA", "HiP-LoRA"], ("HiP-LoRA", "LoRA")),
        (["hip_lora", "PiSSA", "lora"], ("hip_lora", "lora")),
        (["HiP-LoRA", "HiP-LoRA (activation)", "LoRA"], ("HiP-LoRA (activation)", "LoRA")),
        (["HiP-LoRA (activation)", "PiSSA"], ("HiP-LoRA (activation)", "PiSSA")),
        (["PiSSA", "Proj-LoRA"], ("Proj-LoRA", "PiSSA")),
        (["LoRA"], None),
    ],
)
def test_hiplora_is_compared_with_plain_lora_where_both_are_there(names, pair):
    assert contenders(names) == pair


def test_survival_leads_the_verdict_of_a_demo():
    found = merged(hip=(1.0, 0.84, 0.84, 0.2), lora=(1.0, 0.29, 0.29, 1.6))
    assert (
        found.headline
        == "Added together, HiP-LoRA's adapters kept 84\u00a0% of their edits, LoRA's 29\u00a0%."
    )
    assert "drifted 8.0 times less than LoRA's from the base model" in found.sentences[-1]


def test_a_demo_that_lora_wins_says_so():
    found = merged(hip=(1.0, 0.3, 0.3, 2.0), lora=(1.0, 0.8, 0.8, 1.0))
    assert found.headline.startswith("LoRA did better here:")
    assert "drifted 2.0 times as far as LoRA's" in found.sentences[-1]


def test_fewer_edits_kept_for_less_drift_is_called_mixed():
    headline = merged(hip=(1.0, 0.7, 0.7, 0.2), lora=(1.0, 0.9, 0.9, 1.0)).headline.replace("\u00a0", " ")
    assert headline == (
        "Mixed: added together, LoRA's adapters kept 90 % of their edits, HiP-LoRA's 70 %; "
        "but the merged HiP-LoRA model drifted 5.0 times less than LoRA's."
    )


def test_a_difference_of_less_than_two_edits_is_no_difference():
    near, far = (1.0, 0.50, 0.50, 1.0), (1.0, 0.55, 0.55, 1.0)
    assert "about as many" in merged(near, far, count=16).headline
    assert "LoRA did better" in merged(near, far, count=100).headline


def test_keeping_a_larger_share_of_fewer_edits_is_not_sold_as_a_win():
    headline = merged(hip=(0.4, 0.36, 0.9, 0.1), lora=(1.0, 0.7, 0.7, 1.0)).headline.replace("\u00a0", " ")
    assert headline.startswith("After the merge more edits work with LoRA (70 %) than with HiP-LoRA (36 %)")
    assert "although HiP-LoRA kept a larger share of those that it had made (90 % against 70 %)" in headline


def test_a_demo_without_survival_falls_back_to_the_comparison():
    raw = samples.demo_results()
    raw["edits"]["methods"]["LoRA"]["merged"]["survival"] = None
    assert "learned as much as LoRA" in verdict(read_results(raw)).headline


def test_an_inspection_counts_energy_on_both_sides_once():
    rows = [{"module": "a", "norm": 1.0, "left": 0.3, "right": 0.2, "both": 0.1},
            {"module": "b", "norm": 0.0, "left": 0.9, "right": 0.9, "both": 0.9}]  # fmt: skip
    found = inspection_verdict(read_inspection(samples.inspection(modules=rows)))
    assert found.headline.replace("\u00a0", " ").startswith("40 % of this update's energy touches the top 32")
    assert "not measured" in inspection_verdict(read_inspection(samples.inspection(modules=[]))).headline
