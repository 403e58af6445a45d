"""Training on edits, and runs of edits: modes, the base that comes back, and resumption."""

import contextlib
import copy
import json
from dataclasses import replace

import peft
import pytest
import torch
from peft import LoraConfig
from pydantic import ValidationError

import hiplora
from hiplora.editing import (
    AlphaEdit,
    EditSettings,
    EditTraining,
    Reference,
    evaluate_edits,
    run_edits,
    train_edits,
)
from hiplora.errors import AdapterError, ConfigError
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.unit.editing.samples import EDITS, QUESTIONS, bits, writer

TRAINING = EditTraining(steps=4, lr=2e-2, batch_size=4)
ALPHA = AlphaEdit(
    threshold=0.02, ridge=1e-3, calibration_tokens=400, value_steps=3, prefixes=1, prefix_tokens=3
)
METHODS = {
    "lora": LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    "hiplora": hiplora.HipLoraConfig(
        r=8, lora_alpha=16, principal_rank=4, basis="weight", target_modules=["q_proj", "v_proj", "up_proj"]
    ),
    "pissa": LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", init_lora_weights="pissa"),
    "alphaedit": ALPHA,
    "factory": lambda model: peft.get_peft_model(model, LoraConfig(r=8, target_modules="all-linear")),
}


def adapted():
    torch.manual_seed(0)
    return peft.get_peft_model(tiny_llama(), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))


def test_the_first_loss_is_the_mean_over_the_answers_tokens_and_training_prefers_the_new_answers():
    model, tokenizer, edits = adapted(), tiny_tokenizer(), EDITS[:3]
    fresh = evaluate_edits(model, tokenizer, edits)
    rows = []
    result = train_edits(model, tokenizer, edits, EditTraining(steps=40, lr=2e-2, batch_size=3), rows.append)
    tokens = sum(len(f" {edit.new}") for edit in edits)
    assert result.curve[0] == pytest.approx(-fresh["log_prob_new"].sum() / tokens, rel=1e-5)
    assert [(row["step"], row["loss"]) for row in rows] == list(enumerate(result.curve, start=1))
    assert evaluate_edits(model, tokenizer, edits)["preferred"].all()
    assert result.tokens == 40 * sum(len(tokenizer(f"{e.prompt} {e.new}")["input_ids"]) for e in edits)
    assert not model.training


def test_every_edit_is_seen_equally_often_in_an_order_of_the_seed():
    def seen(seed):
        model, batches = adapted(), []
        model.register_forward_pre_hook(
            lambda _, args, kwargs: batches.append(kwargs["input_ids"]), with_kwargs=True
        )
        train_edits(model, tiny_tokenizer(), EDITS[:3], EditTraining(steps=3, batch_size=2, seed=seed))
        return [tuple(row.tolist()) for batch in batches for row in batch]

    assert sorted(map(seen(1).count, set(seen(1)))) == [2, 2, 2]
    assert seen(1) == seen(1) != seen(2)


def test_a_training_that_cannot_work_is_an_error():
    with pytest.raises(AdapterError, match="no trainable parameter"):
        train_edits(tiny_llama().requires_grad_(False), tiny_tokenizer(), EDITS, EditTraining())
    model = adapted()
    with torch.no_grad():
        model.base_model.model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(AdapterError, match="nan at step 1; lower the learning rate"):
        train_edits(model, tiny_tokenizer(), EDITS, EditTraining(steps=1))
    for wrong in ({"steps": 0}, {"batch_size": 0}, {"lr": 0.0}, {"lr": float("inf")}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            EditTraining(**wrong)


def run(
    mode, method="lora", edits=EDITS, model=None, reference=True, settings=None, training=TRAINING, **kwargs
):
    model, tokenizer = model or writer(), tiny_tokenizer()
    frozen = Reference.freeze(model, tokenizer, QUESTIONS, EDITS) if reference else None
    chosen = METHODS[method] if callable(METHODS[method]) else copy.deepcopy(METHODS[method])
    how = EditSettings(training, **(settings or {}))
    return run_edits(model, tokenizer, chosen, edits, mode, how, frozen, name=method, **kwargs)


def likelihoods(records):
    return pytest.approx(records["log_prob_new"].tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("mode", "method"), [("single", "lora"), *(("sequential", name) for name in METHODS)]
)
def test_the_base_is_bit_identical_afterwards(mode, method):
    model = writer()
    parameters, before = dict(model.named_parameters()), bits(model)
    flags = {name: p.requires_grad for name, p in parameters.items()}
    run(mode, method, EDITS[:2], model, False, {} if mode == "single" else {"edits_per_batch": 1})
    after = bits(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p is parameters[name] and p.grad is None for name, p in model.named_parameters())
    assert not model.training


@pytest.mark.parametrize("method", list(METHODS))
def test_with_an_editor_off_the_base_answers_bit_for_bit(method):
    model, ids, seen = writer(), torch.arange(20)[None], []
    with torch.no_grad():
        base = model(input_ids=ids).logits

    def edited(number, editor):
        editor.model.eval()
        for off in (False, True, False):
            with torch.no_grad(), editor.off() if off else contextlib.nullcontext():
                seen.append(editor.model(input_ids=ids).logits)

    run("batch", method, EDITS[:2], model, reference=False, on_edited=edited)
    on, off, again = seen
    assert torch.equal(off, base)
    assert torch.equal(on, again)
    assert not torch.equal(on, base)


def test_a_method_that_writes_into_the_base_is_found_out_and_a_failure_leaves_the_base():
    def harmful(model):
        with torch.no_grad():
            model.model.norm.weight.data[0] += 1
        return adapted()

    with pytest.raises(AdapterError, match="changed weights of the base model in place"):
        run_edits(writer(), tiny_tokenizer(), harmful, EDITS[:1], "batch", EditSettings(TRAINING))
    model = writer()
    before = bits(model)
    with pytest.raises(KeyboardInterrupt):
        run("batch", model=model, on_edited=lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(model).items())


@pytest.mark.parametrize("method", ["lora", "hiplora", "pissa"])
def test_a_batch_teaches_all_edits(method):
    found = run("batch", method, training=replace(TRAINING, steps=25))
    assert found.summary()["after"]["all"]["success"] > found.summary()["before"]["all"]["success"]
    assert found.summary()["after"]["all"]["preferred"] == 100
    (stage,) = found.stages
    assert (stage.taught, len(stage.took["loss"])) == (list(range(6)), 25)


def test_batches_apart_and_single_edits_do_not_know_of_each_other():
    found = run("batch", settings={"edits_per_batch": 4})
    assert [stage.records["index"].tolist() for stage in found.stages] == [[0, 1, 2, 3], [4, 5]]
    alone = run("batch", edits=EDITS[4:], reference=False)
    assert found.stages[1].records["log_prob_new"].tolist() == likelihoods(alone.stages[0].records)
    assert found.after["index"].tolist() == list(range(6))
    single = run("single", reference=False, settings={"sample": 2})
    assert [len(stage.taught) for stage in single.stages] == [1, 1]
    again = run("single", reference=False, settings={"sample": 2})
    assert [one.taught for one in again.stages] == [one.taught for one in single.stages]
    (last,) = single.stages[1].taught
    fresh = run("single", edits=EDITS[last : last + 1], reference=False)
    assert single.stages[1].records["log_prob_new"].tolist() == likelihoods(fresh.stages[0].records)


@pytest.mark.parametrize("method", ["lora", "alphaedit"])
def test_a_sequence_goes_on_from_the_stage_before_and_measures_the_newest_and_all_so_far(method):
    found = run("sequential", method, settings={"edits_per_batch": 2})
    told = json.loads(json.dumps(found.as_dict(texts=True)))
    assert [stage["taught"] for stage in told["stages"]] == [[0, 1], [2, 3], [4, 5]]
    assert [stage["records"]["index"] for stage in told["stages"]] == [[0, 1], [0, 1, 2, 3], list(range(6))]
    assert told["stages"][2]["newest"]["all"]["edits"] == 2
    assert told["stages"][2]["so_far"]["all"]["edits"] == 6
    assert told["stages"][2]["locality"] == told["summary"]["locality"]
    assert len(told["questions"]["log_prob"]) == len(told["questions"]["written_before"]) == len(QUESTIONS)
    second = run("batch", method, edits=EDITS[2:4], reference=False).stages[0].records
    assert told["stages"][1]["records"]["log_prob_new"][2:] != likelihoods(second)


@pytest.mark.parametrize(("mode", "method"), [("batch", "lora"), *(("sequential", name) for name in METHODS)])
def test_an_interrupted_run_continues_after_the_finished_stages_as_if_it_had_not_stopped(
    tmp_path, mode, method
):
    how = {"settings": {"edits_per_batch": 2}, "folder": tmp_path}
    whole = run(mode, method, settings={"edits_per_batch": 2}, on_edited=lambda number, _: {"n": number})
    numbers = []

    def edited(number, editor):
        numbers.append(number)
        if len(numbers) == 3:
            raise KeyboardInterrupt
        return {"n": number}

    with pytest.raises(KeyboardInterrupt):
        run(mode, method, on_edited=edited, **how)
    again = run(mode, method, on_edited=edited, **how)
    assert numbers == [1, 2, 3, 3]
    assert again.as_dict() == whole.as_dict()
    assert [stage.extra for stage in again.stages] == [{"n": 1}, {"n": 2}, {"n": 3}]
    with pytest.raises(ConfigError, match="taught other edits"):
        run(mode, settings={"edits_per_batch": 3}, folder=tmp_path)


@pytest.mark.parametrize(
    ("mode", "settings", "said"),
    [
        ("single", {"edits_per_batch": 2}, "edits_per_batch has no use in the mode single"),
        ("batch", {"sample": 2}, "sample is for the mode single"),
        ("batch", {"edits_per_batch": 0}, "edits_per_batch"),
    ],
)
def test_settings_without_a_use_are_errors(mode, settings, said):
    with pytest.raises(ValueError, match=said):
        run(mode, settings=settings)


def test_no_edits_are_an_error():
    with pytest.raises(ConfigError, match="there are no edits"):
        run("batch", edits=(), reference=False)
