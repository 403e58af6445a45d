"""Training on edits, and runs of edits: groups, and the base that comes back."""

import contextlib
import copy
import json

import peft
import pytest
import torch
from peft import LoraConfig

import hiplora
from hiplora.editing import AlphaEdit, CrispEdit, EditTraining, edit_groups, evaluate_edits, run_edits, train_edits
from hiplora.errors import AdapterError, ConfigError
from hiplora.run_folder import RunFolder
from tests.tiny import left_as_it_was, tiny_llama, tiny_tokenizer
from tests.unit.editing.samples import EDITS, QUESTIONS, writer

TOKENIZER = tiny_tokenizer()
TRAINING = EditTraining(steps=4, lr=2e-2, batch_size=4)
LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
PROJECTIONS = ["q_proj", "v_proj", "up_proj"]
METHODS = {
    "lora": LORA,
    "hiplora": hiplora.HipLoraConfig(r=8, lora_alpha=16, principal_rank=4, basis="weight", target_modules=PROJECTIONS),
    "pissa": LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", init_lora_weights="pissa"),
    "alphaedit": AlphaEdit(
        threshold=0.02, ridge=1e-3, calibration_tokens=400, value_steps=3, prefixes=1, prefix_tokens=3
    ),
    "crispedit": CrispEdit(calibration_tokens=400),
    "factory": lambda model: peft.get_peft_model(model, copy.deepcopy(LORA)),
}


def adapted():
    torch.manual_seed(0)
    return peft.get_peft_model(tiny_llama(), copy.deepcopy(LORA))


def test_the_first_loss_is_the_mean_over_the_answers_tokens_and_training_prefers_the_new_answers():
    model, edits, steps = adapted(), EDITS[:3], []
    fresh = evaluate_edits(model, TOKENIZER, edits)
    result = train_edits(model, TOKENIZER, edits, EditTraining(steps=40, lr=2e-2, batch_size=3), steps.append)
    tokens = sum(len(f" {edit.new}") for edit in edits)
    assert result["loss"][0] == pytest.approx(-fresh["log_prob_new"].sum() / tokens, rel=1e-5)
    assert steps == list(range(1, 41))
    assert evaluate_edits(model, TOKENIZER, edits)["preferred"].all()
    assert result["tokens"] == 40 * sum(len(TOKENIZER(f"{e.prompt} {e.new}")["input_ids"]) for e in edits)
    assert not model.training


def test_every_edit_is_seen_equally_often_in_an_order_of_the_seed():
    def seen(seed):
        model, batches = adapted(), []
        model.register_forward_pre_hook(lambda _, args, kwargs: batches.append(kwargs["input_ids"]), with_kwargs=True)
        train_edits(model, TOKENIZER, EDITS[:3], EditTraining(steps=3, batch_size=2, seed=seed))
        return [tuple(row.tolist()) for batch in batches for row in batch]

    assert sorted(map(seen(1).count, set(seen(1)))) == [2, 2, 2]
    assert seen(1) == seen(1) != seen(2)


def test_a_training_that_cannot_work_is_an_error():
    with pytest.raises(AdapterError, match="no trainable parameter"):
        train_edits(tiny_llama().requires_grad_(False), TOKENIZER, EDITS, EditTraining())
    model = adapted()
    with torch.no_grad():
        model.base_model.model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(AdapterError, match="nan at step 1; lower the learning rate"):
        train_edits(model, TOKENIZER, EDITS, EditTraining(steps=1))


def run(method="lora", edits=EDITS, model=None, size=None, training=TRAINING, **kwargs):
    chosen = METHODS[method] if callable(METHODS[method]) else copy.deepcopy(METHODS[method])
    groups = edit_groups(len(edits), size)
    return run_edits(model or writer(), TOKENIZER, chosen, edits, training, groups=groups, **kwargs)


def new_answers(stage):
    return stage["records"]["log_prob_new"]


@pytest.mark.parametrize("method", list(METHODS))
def test_with_an_editor_off_the_base_answers_bit_for_bit_and_afterwards_it_is_back(method):
    model, ids, seen = writer(), torch.arange(20)[None], []
    base = model(input_ids=ids).logits

    def edited(number, editor):
        editor.model.eval()
        for off in (False, True, False):
            with torch.no_grad(), editor.off() if off else contextlib.nullcontext():
                seen.append(editor.model(input_ids=ids).logits)

    with left_as_it_was(model):
        run(method, EDITS[:2], model, 1, sequential=True, on_edited=edited)
    for on, off, again in (seen[:3], seen[3:]):
        assert torch.equal(off, base)
        assert torch.equal(on, again)
        assert not torch.equal(on, base)


def test_a_method_that_writes_into_the_base_is_found_out_and_a_failure_leaves_the_base():
    def harmful(model):
        with torch.no_grad():
            model.model.norm.weight.data[0] += 1
        return adapted()

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(AdapterError, match="changed weights of the base model in place"):
        run_edits(writer(), TOKENIZER, harmful, EDITS[:1], TRAINING)
    model = writer()
    with left_as_it_was(model), pytest.raises(KeyboardInterrupt):
        run(model=model, on_edited=interrupt)


@pytest.mark.parametrize("method", ["lora", "alphaedit", "crispedit"])
def test_groups_apart_do_not_know_of_each_other_and_those_of_a_sequence_do(method):
    apart = run(method, size=2)
    assert [stage["records"]["index"] for stage in apart["stages"]] == [[0, 1], [2, 3], [4, 5]]
    assert apart["summary"]["after"]["all"]["edits"] == 6
    (alone,) = run(method, edits=EDITS[2:4])["stages"]
    assert new_answers(apart["stages"][1]) == pytest.approx(new_answers(alone), abs=1e-4)
    sequence = run(method, size=2, sequential=True, questions=QUESTIONS)
    _, second, third = sequence["stages"]
    assert [stage["taught"] for stage in sequence["stages"]] == [[0, 1], [2, 3], [4, 5]]
    assert [len(stage["records"]["index"]) for stage in sequence["stages"]] == [2, 4, 6]
    assert (third["newest"]["all"]["edits"], third["so_far"]["all"]["edits"]) == (2, 6)
    assert third["locality"] == sequence["summary"]["locality"]
    assert len(sequence["questions"]["log_prob"]) == len(sequence["questions"]["written_before"]) == len(QUESTIONS)
    assert new_answers(second)[2:] != pytest.approx(new_answers(alone), abs=1e-4)


@pytest.mark.parametrize(
    ("method", "sequential"), [("lora", True), ("lora", False), ("alphaedit", True), ("crispedit", True)]
)
def test_what_was_interrupted_goes_on_and_ends_the_same(tmp_path, method, sequential):
    folder = RunFolder(tmp_path / "run", "settings.json", "edit.json")
    options = {"size": 2, "sequential": sequential, "questions": QUESTIONS}
    calls = []

    def interrupt(number, editor):
        calls.append(number)
        if calls == [1, 2]:
            raise KeyboardInterrupt

    with folder.claimed({}), pytest.raises(KeyboardInterrupt):
        run(method, **options, folder=folder, on_edited=interrupt)
    with folder.claimed({}):
        resumed = run(method, **options, folder=folder, on_edited=interrupt)
    assert calls == [1, 2, 2, 3]
    whole = run(method, **options)
    assert min(resumed.pop("seconds"), whole.pop("seconds")) > 0
    assert json.loads(json.dumps(resumed)) == json.loads(json.dumps(whole))


@pytest.mark.parametrize("damage", ["removed", "cut short"])
def test_a_sequence_whose_saved_batch_is_damaged_is_not_carried_on(tmp_path, damage):
    folder = RunFolder(tmp_path / "run", "settings.json", "edit.json")

    def interrupt(number, editor):
        if number == 2:
            raise KeyboardInterrupt

    with folder.claimed({}), pytest.raises(KeyboardInterrupt):
        run("lora", size=2, sequential=True, folder=folder, on_edited=interrupt)
    (saved,) = (tmp_path / "run" / "stages").glob("*.safetensors")
    if damage == "removed":
        saved.unlink()
    else:
        saved.write_bytes(saved.read_bytes()[:9])
    with folder.claimed({}), pytest.raises(ConfigError, match=r"cannot be carried on after batch 1 .*--overwrite"):
        run("lora", size=2, sequential=True, folder=folder)
