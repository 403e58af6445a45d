"""Knowledge editing from results made by hand."""

import pytest

from tests.unit.study.protocols.by_hand import fill, row, study_of, table

EDITING = (
    "editing: {methods: [lora, hiplora], modes: [MODE], alphaedit: {layers: [0]}, crispedit: {energy: 0.5}, "
    "sets: {facts: {title: Facts}}, questions: 2, lr: {hiplora: 0.5}}"
)
CATEGORIES = ("Relation/Fact", "Entity/Attribute", "Entity/Attribute", "Temporal/Numeric")


def stage(index, success):
    """A stage's records of some edits."""
    columns = dict.fromkeys(("success", "preferred", "exact", "paraphrase_success"), success)
    kinds = [CATEGORIES[place] for place in index]
    return {"records": {"index": index, "category": kinds, **columns, "neighbours_kept": None}}


def edits(mode, correct, *stages):
    """What `edit` finds: the base answers both questions right."""
    before = {"correct_before": [1, 1], "log_prob_before": [-1, -1], "edited_log_prob_before": [-6, -6]}
    after = {"correct": correct, "unchanged": correct, "log_prob": [-2, -3], "edited_log_prob": [-5, -5]}
    drift = {"prose": {"kl": 0.1, "perplexity_ratio": 1.0}}
    return {"mode": mode, "stages": list(stages), "questions": {**before, **after}, "drift": drift}


def filled(tmp_path, mode, lora, others):
    study, _ = study_of(tmp_path, EDITING.replace("MODE", mode))
    settings = study.recipe.protocols.editing
    return fill(study, settings, lambda job, at: lora[at["seed"]] if at["method"] == "LoRA" else others)


def test_an_edit_counts_with_its_mean_over_the_seeds_and_losses_are_of_the_questions(tmp_path):
    lora = {
        42: edits("batch", [1, 0], stage([0, 1], [1, 1]), stage([2, 3], [1, 0])),
        100: edits("batch", [1, 1], stage([0, 1], [1, 1]), stage([2, 3], [0, 0])),
    }
    others = edits("batch", [0, 0], stage([0, 1], [1, 1]), stage([2, 3], [1, 1]))
    findings = filled(tmp_path, "batch", lora, others)
    success = row(findings, "edit success", "LoRA", set="facts", mode="batch")
    assert (success.estimate, success["items"], success.seeds) == (pytest.approx(100 * 2.5 / 4), 4, 2)
    assert row(findings, "locality", "LoRA").estimate == pytest.approx(25)
    assert row(findings, "locality difference", "HiP-LoRA (paper)", minus="LoRA").estimate == pytest.approx(75)
    assert row(findings, "log-probability change", "AlphaEdit").estimate == pytest.approx(-1.5)
    kind = row(findings, "edit success by category", "LoRA", category="Entity/Attribute")
    assert kind.estimate == pytest.approx(75)
    assert list(table(findings, "editing-facts-batch").index) == ["LoRA", "HiP-LoRA (paper)", "AlphaEdit", "CrispEdit"]
    assert "HiP-LoRA (paper) 0.5" in findings.text


def test_of_a_sequence_all_edits_so_far_count_after_each_stage(tmp_path):
    run = edits("sequential", [1, 1], stage([0, 1], [1, 1]), stage([0, 1, 2, 3], [1, 0, 0, 0]))
    findings = filled(tmp_path, "sequential", {42: run, 100: run}, run)
    assert row(findings, "edit success", "LoRA").estimate == 25
    rows = findings.measured
    course = rows[(rows.metric == "edit success so far") & (rows.method == "LoRA")]
    assert course.set_index("edits").estimate.to_dict() == {2: 100, 4: 25}
    assert "editing-facts-sequence" in findings.figures
