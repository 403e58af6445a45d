import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hiplora.editing import (
    EditSettings,
    EditTraining,
    Question,
    Reference,
    locality,
    measure_locality,
    run_edits,
)
from hiplora.editing.asking import answer_log_probs, continuations
from hiplora.errors import AdapterError, DataError
from tests.tiny import tiny_tokenizer
from tests.unit.editing.samples import EDITS, QUESTIONS, writer


def freeze(model, questions=QUESTIONS):
    return Reference.freeze(model, tiny_tokenizer(), questions, EDITS)


def test_the_reference_holds_what_the_bare_base_says():
    model, tokenizer = writer(), tiny_tokenizer()
    reference = freeze(model)
    prompts = [item.prompt for item in QUESTIONS]
    assert reference.continuations == tuple(continuations(model, tokenizer, prompts, reference.length))
    pairs = [(item.prompt, item.answer) for item in QUESTIONS]
    assert reference.log_probs == pytest.approx(answer_log_probs(model, tokenizer, pairs))
    assert reference.edited_targets == ("blue", "pink", "grey")
    edited = list(zip(prompts, reference.edited_targets, strict=True))
    assert reference.edited_log_probs == pytest.approx(answer_log_probs(model, tokenizer, edited))
    assert reference.correct == (False,) * 3


def test_right_answers_are_found_after_normalisation(monkeypatch):
    said = [" A ROOF, of course", " doors", " not a wall"]
    monkeypatch.setattr(locality, "continuations", lambda *arguments: said)
    assert freeze(writer()).correct == (True, False, False)


def test_the_record_survives_json():
    reference = freeze(writer())
    assert Reference.from_dict(json.loads(json.dumps(reference.as_dict()))) == reference


def test_the_untouched_base_shows_no_change_at_all():
    model = writer()
    reference = freeze(model)
    outcome = measure_locality(model, tiny_tokenizer(), reference)
    summary = outcome.summary(reference)
    assert summary["unchanged"] == 100
    assert summary["accuracy_change"] == summary["log_prob_change"] == summary["edited_log_prob_change"] == 0
    assert outcome.log_probs == reference.log_probs


def test_an_edited_model_is_held_against_the_base_and_not_against_itself():
    model = writer()
    reference = freeze(model)
    run = run_edits(
        model,
        tiny_tokenizer(),
        LoraConfig(r=8, lora_alpha=32, target_modules="all-linear"),
        EDITS,
        "batch",
        EditSettings(EditTraining(steps=40, lr=2e-2)),
        reference,
    )
    found = run.summary()["locality"]
    # Taken after the edits, the reference would agree with the edited model in everything.
    assert found["unchanged"] < 100
    assert abs(found["log_prob_change"]) > 0.5
    assert found["edited_log_prob_change"] > 0.5  # the new answers leak into prompts where they do not belong
    assert run.reference == reference


def test_accuracy_changes_are_in_percentage_points():
    model = writer()
    with torch.no_grad():
        said = continuations(model, tiny_tokenizer(), [item.prompt for item in QUESTIONS], 9)
    reference = freeze(model)
    right = Reference.from_dict({**reference.as_dict(), "correct": [True, True, False]})
    summary = measure_locality(model, tiny_tokenizer(), right).summary(right)
    assert len(said) == 3
    assert summary["accuracy_before"] == pytest.approx(200 / 3)
    assert summary["accuracy_change"] == pytest.approx(-200 / 3)


def test_a_reference_is_not_taken_from_a_model_with_an_adapter():
    adapted = get_peft_model(writer(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="freeze the reference before editing"):
        freeze(adapted)


def test_a_reference_of_other_weights_is_refused():
    model = writer()
    reference = freeze(model)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(AdapterError, match="frozen with other weights"):
        run_edits(
            model, tiny_tokenizer(), LoraConfig(target_modules=["q_proj"]), EDITS, "batch", None, reference
        )


def test_a_question_about_an_edited_subject_is_refused():
    with pytest.raises(DataError, match="about Thing 0, which is edited"):
        freeze(writer(), [Question("Thing 0 has a", "lid", "Thing 0")])
    with pytest.raises(DataError, match="0 questions"):
        freeze(writer(), [])
