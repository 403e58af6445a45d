"""Training on edits, and runs of edits: groups, and the base that comes back."""

import contextlib
import copy
import json

import peft
import pytest
import torch
from peft import LoraConfig

import hiplora
from hiplora.editing import AlphaEdit, EditTraining, edit_groups, evaluate_edits, run_edits, train_edits
from hiplora.errors import AdapterError
from hiplora.run_folder import RunFolder
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.unit.editing.samples import EDITS, QUESTIONS, bits, writer

TRAINING = EditTraining(steps=4, lr=2e-2, batch_size=4)
ALPHA = AlphaEdit(threshold=0.02, ridge=1e-3, calibration_tokens=400, value_steps=3, prefixes=1, prefix_tokens=3)
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
    fresh, steps = evaluate_edits(model, tokenizer, edits), []
    result = train_edits(model, tokenizer, edits, EditTraining(steps=40, lr=2e-2, batch_size=3), steps.append)
    tokens = sum(len(f" {edit.new}") for edit in edits)
    assert result["loss"][0] == pytest.approx(-fresh["log_prob_new"].sum() / tokens, rel=1e-5)
    assert steps == list(range(1, 41))
    assert evaluate_edits(model, tokenizer, edits)["preferred"].all()
    assert result["tokens"] == 40 * sum(len(tokenizer(f"{e.prompt} {e.new}")["input_ids"]) for e in edits)
    assert not model.training


def test_every_edit_is_seen_equally_often_in_an_order_of_the_seed():
    def seen(seed):
        model, batches = adapted(), []
        model.register_forward_pre_hook(lambda _, args, kwargs: batches.append(kwargs["input_ids"]), with_kwargs=True)
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


def run(method="lora", edits=EDITS, model=None, size=None, training=TRAINING, **kwargs):
    chosen = METHODS[method] if callable(METHODS[method]) else copy.deepcopy(METHODS[method])
    groups = edit_groups(len(edits), size)
    return run_edits(model or writer(), tiny_tokenizer(), chosen, edits, training, groups=groups, **kwargs)


def new_answers(stage):
    return stage["records"]["log_prob_new"]


@pytest.mark.parametrize(("method", "sequential"), [("lora", False), *((name, True) for name in METHODS)])
def test_the_base_is_bit_identical_afterwards(method, sequential):
    model = writer()
    parameters, before = dict(model.named_parameters()), bits(model)
    flags = {name: p.requires_grad for name, p in parameters.items()}
    run(method, EDITS[:2], model, 1, sequential=sequential)
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

    run(method, EDITS[:2], model, on_edited=edited)
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
        run_edits(writer(), tiny_tokenizer(), harmful, EDITS[:1], TRAINING)
    model = writer()
    before = bits(model)
    with pytest.raises(KeyboardInterrupt):
        run(model=model, on_edited=lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(model).items())


@pytest.mark.parametrize("method", ["lora", "hiplora", "pissa"])
def test_a_batch_teaches_all_edits(method):
    found = run(method, training=EditTraining(steps=25, lr=2e-2, batch_size=4))
    assert found["summary"]["after"]["all"]["success"] > found["summary"]["before"]["all"]["success"]
    assert found["summary"]["after"]["all"]["preferred"] == 100
    (stage,) = found["stages"]
    assert (stage["taught"], len(stage["took"]["loss"])) == (list(range(6)), 25)


@pytest.mark.parametrize("method", ["lora", "alphaedit"])
def test_groups_apart_do_not_know_of_each_other(method):
    found = run(method, size=4)
    assert [stage["records"]["index"] for stage in found["stages"]] == [[0, 1, 2, 3], [4, 5]]
    assert found["summary"]["after"]["all"]["edits"] == 6
    (alone,) = run(method, edits=EDITS[4:])["stages"]
    assert new_answers(found["stages"][1]) == pytest.approx(new_answers(alone), abs=1e-4)


@pytest.mark.parametrize("method", ["lora", "alphaedit"])
def test_a_sequence_goes_on_from_the_stage_before_and_measures_the_newest_and_all_so_far(method):
    told = run(method, size=2, sequential=True, questions=QUESTIONS)
    _, second, third = told["stages"]
    assert [stage["taught"] for stage in told["stages"]] == [[0, 1], [2, 3], [4, 5]]
    assert [len(stage["records"]["index"]) for stage in told["stages"]] == [2, 4, 6]
    assert (third["newest"]["all"]["edits"], third["so_far"]["all"]["edits"]) == (2, 6)
    assert third["locality"] == told["summary"]["locality"]
    assert len(told["questions"]["log_prob"]) == len(told["questions"]["written_before"]) == len(QUESTIONS)
    (alone,) = run(method, edits=EDITS[2:4])["stages"]
    assert new_answers(second)[2:] != pytest.approx(new_answers(alone), abs=1e-4)


@pytest.mark.parametrize(("method", "sequential"), [("lora", True), ("lora", False), ("alphaedit", True)])
def test_what_was_interrupted_goes_on_and_ends_the_same(tmp_path, method, sequential):
    folder = RunFolder(tmp_path / "run", "settings.json", "edit.json")
    asked = {"size": 2, "sequential": sequential, "questions": QUESTIONS}
    calls = []

    def interrupt(number, editor):
        calls.append(number)
        if calls == [1, 2]:
            raise KeyboardInterrupt

    with folder.claimed({}), pytest.raises(KeyboardInterrupt):
        run(method, **asked, folder=folder, on_edited=interrupt)
    with folder.claimed({}):
        found = run(method, **asked, folder=folder, on_edited=interrupt)
    assert calls == [1, 2, 2, 3]
    whole = run(method, **asked)
    assert found.pop("seconds") > 0
    assert whole.pop("seconds") > 0
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(whole))
