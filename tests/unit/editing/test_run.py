import contextlib
import copy
import json

import peft
import pytest
import torch
from peft import LoraConfig

import hiplora
from hiplora.editing import AlphaEdit, EditSettings, EditTraining, Reference, run_edits
from hiplora.editing.asking import answer_log_probs
from hiplora.errors import AdapterError, ConfigError
from tests.tiny import tiny_tokenizer
from tests.unit.editing.samples import EDITS, QUESTIONS, bits, writer

TRAINING = EditTraining(steps=25, lr=2e-2, batch_size=4)
ALPHA = AlphaEdit(
    threshold=0.02, ridge=1e-3, calibration_tokens=400, value_steps=8, prefixes=2, prefix_tokens=3
)
METHODS = {
    "lora": LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    "hiplora": hiplora.HipLoraConfig(r=8, lora_alpha=16, principal_rank=4),
    "pissa": LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", init_lora_weights="pissa"),
    "alphaedit": ALPHA,
    "factory": lambda model: peft.get_peft_model(model, LoraConfig(r=8, target_modules="all-linear")),
}


def run(mode, method="lora", edits=EDITS, model=None, reference=True, **kwargs):
    model, tokenizer = model or writer(), tiny_tokenizer()
    frozen = Reference.freeze(model, tokenizer, QUESTIONS, EDITS) if reference else None
    settings = EditSettings(TRAINING, **kwargs.pop("settings", {}))
    chosen = METHODS[method] if callable(METHODS[method]) else copy.deepcopy(METHODS[method])
    return run_edits(model, tokenizer, chosen, edits, mode, settings, frozen, name=method, **kwargs)


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("mode", ["single", "batch", "sequential"])
def test_the_base_is_bit_identical_afterwards(mode, method):
    model = writer()
    parameters, before = dict(model.named_parameters()), bits(model)
    flags = {name: p.requires_grad for name, p in parameters.items()}
    run(
        mode,
        method,
        EDITS[:2],
        model,
        reference=False,
        settings={} if mode == "single" else {"edits_per_batch": 1},
    )
    after = bits(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p is parameters[name] and p.grad is None for name, p in model.named_parameters())
    assert not model.training


def test_a_method_that_writes_into_the_base_is_found_out():
    def harmful(model):
        with torch.no_grad():
            model.model.norm.weight.data[0] += 1
        return peft.get_peft_model(model, LoraConfig(target_modules=["q_proj"]))

    with pytest.raises(AdapterError, match="changed weights of the base model in place"):
        run_edits(writer(), tiny_tokenizer(), harmful, EDITS[:1], "batch", EditSettings(TRAINING))


def test_the_base_comes_back_when_a_stage_fails():
    model = writer()
    before = bits(model)
    with pytest.raises(KeyboardInterrupt):
        run("batch", model=model, on_stage=lambda stage: (_ for _ in ()).throw(KeyboardInterrupt))
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(model).items())


@pytest.mark.parametrize("method", ["lora", "hiplora", "pissa"])
def test_a_batch_teaches_all_edits(method):
    found = run("batch", method)
    assert found.summary()["after"]["all"]["success"] > found.summary()["before"]["all"]["success"]
    assert found.summary()["after"]["all"]["preferred"] == 100
    (stage,) = found.stages
    assert stage.taught == tuple(range(6))
    assert len(stage.took["loss"]) == 25
    assert len(stage.locality.log_probs) == len(QUESTIONS)


def test_batches_apart_do_not_know_of_each_other():
    found = run("batch", settings={"edits_per_batch": 4})
    assert [stage.taught for stage in found.stages] == [(0, 1, 2, 3), (4, 5)]
    assert [[record.index for record in stage.records] for stage in found.stages] == [[0, 1, 2, 3], [4, 5]]
    alone = run("batch", edits=EDITS[4:], reference=False)
    assert [record.asked.log_prob_new for record in found.stages[1].records] == pytest.approx(
        [record.asked.log_prob_new for record in alone.stages[0].records], abs=1e-4
    )
    assert [record.index for record in found.after] == list(range(6))


def test_a_single_edit_is_taken_back_before_the_next():
    found = run("single", reference=False)
    assert [stage.taught for stage in found.stages] == [(i,) for i in range(6)]
    fresh = run("single", edits=EDITS[3:4], reference=False)
    assert found.stages[3].records[0].asked.log_prob_new == pytest.approx(
        fresh.stages[0].records[0].asked.log_prob_new, abs=1e-4
    )
    assert found.summary()["after"]["all"] == {
        **found.summary()["after"]["all"],
        "edits": 6,
        "preferred": 100,
    }


def test_a_sample_of_single_edits_follows_from_the_seed():
    chosen = [stage.taught for stage in run("single", reference=False, settings={"sample": 2}).stages]
    assert len(chosen) == 2
    assert chosen == [stage.taught for stage in run("single", reference=False, settings={"sample": 2}).stages]


@pytest.mark.parametrize("method", ["lora", "alphaedit"])
def test_a_sequence_measures_the_newest_batch_and_all_so_far(method):
    found = run("sequential", method, settings={"edits_per_batch": 2})
    assert [stage.taught for stage in found.stages] == [(0, 1), (2, 3), (4, 5)]
    assert [[r.index for r in stage.records] for stage in found.stages] == [
        [0, 1],
        [0, 1, 2, 3],
        [0, 1, 2, 3, 4, 5],
    ]
    assert [[r.index for r in stage.newest] for stage in found.stages] == [[0, 1], [2, 3], [4, 5]]
    # The second stage goes on from the first one, not from the base.
    second = run("batch", method, edits=EDITS[2:4], reference=False).stages[0].records[0]
    there = next(record for record in found.stages[1].records if record.index == 2)
    assert there.asked.log_prob_new != pytest.approx(second.asked.log_prob_new, abs=1e-3)
    assert len(found.after) == 6


def test_the_record_is_json_with_every_edits_values_and_a_row_for_each_category():
    found = json.loads(json.dumps(run("sequential", settings={"edits_per_batch": 3}).as_dict()))
    assert list(found["summary"]["after"]) == ["all", "Entity/Attribute", "Relation/Fact", "Temporal/Numeric"]
    last = found["stages"][-1]
    assert [record["index"] for record in last["records"]] == list(range(6))
    assert {"preferred", "exact", "success", "log_prob_new", "log_prob_old", "written"} == set(
        last["records"][0]["asked"]
    )
    assert last["newest"]["all"]["edits"] == 3
    assert last["so_far"]["all"]["edits"] == 6
    assert len(last["locality"]["items"]["correct"]) == len(found["reference"]["correct"]) == len(QUESTIONS)
    assert [record["index"] for record in found["before"]] == list(range(6))


def test_neighbours_are_kept_where_their_answer_is_likelier_than_the_new_one():
    model, tokenizer = writer(), tiny_tokenizer()
    found = run("single", edits=EDITS[:2], model=model, reference=False)
    near, new = EDITS[1].neighbours[0], EDITS[1].new
    true, wrong = answer_log_probs(model, tokenizer, [(near.prompt, near.answer), (near.prompt, new)])
    assert found.before[1].neighbours_kept == (true > wrong,)
    assert found.before[0].neighbours_kept == ()
    assert found.stages[1].records[0].neighbours_kept == (False,)  # so near that the edit spills over
    assert found.summary()["after"]["all"]["neighbours_kept"] == 0


def test_stages_are_told_as_they_come_and_the_edited_model_can_be_kept():
    stages, saved = [], []
    run(
        "sequential",
        reference=False,
        settings={"edits_per_batch": 3},
        on_stage=stages.append,
        on_edited=lambda number, editor: saved.append((number, type(editor.model).__name__)),
    )
    assert [stage.number for stage in stages] == [1, 2]
    assert saved == [(1, "PeftModel"), (2, "PeftModel")]


@pytest.mark.parametrize(
    ("mode", "settings", "said"),
    [
        ("all", {}, "mode is 'all'; expected one of single, batch, sequential"),
        ("single", {"edits_per_batch": 2}, "edits_per_batch has no use in the mode single"),
        ("batch", {"sample": 2}, "sample is for the mode single"),
        ("batch", {"edits_per_batch": 0}, "edits_per_batch is 0"),
    ],
)
def test_settings_without_a_use_are_errors(mode, settings, said):
    with pytest.raises(ConfigError, match=said):
        run(mode, settings=settings)


def test_no_edits_are_an_error():
    with pytest.raises(ConfigError, match="there are no edits"):
        run("batch", edits=(), reference=False)


def interrupted(mode, method, stop, **settings):
    """Run until `stop` stages are done; return them with what the editor held then."""
    stages, states = [], []

    def edited(number, editor):
        states.append(editor.state())
        if number == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(mode, method, settings=settings, on_stage=stages.append, on_edited=edited)
    return stages, states[-1]


def told(found):
    """The run without its times."""
    return [
        (stage.taught, stage.records, stage.locality, {**stage.took, "seconds": 0}) for stage in found.stages
    ]


@pytest.mark.parametrize("method", list(METHODS))
def test_a_sequence_goes_on_after_the_stages_that_are_done_as_if_it_had_not_stopped(method):
    whole = run("sequential", method, settings={"edits_per_batch": 2})
    stages, state = interrupted("sequential", method, 2, edits_per_batch=2)
    later = []
    again = run(
        "sequential",
        method,
        settings={"edits_per_batch": 2},
        done=stages,
        state=state,
        on_stage=later.append,
    )
    assert [stage.number for stage in later] == [3]
    assert told(again) == told(whole)


def test_stages_of_another_run_and_a_sequence_without_its_state_are_refused():
    stages, _ = interrupted("sequential", "lora", 1, edits_per_batch=2)
    with pytest.raises(ConfigError, match="taught other edits"):
        run("sequential", settings={"edits_per_batch": 3}, done=stages)
    with pytest.raises(ConfigError, match="goes on from the editor's state"):
        run("sequential", settings={"edits_per_batch": 2}, done=stages)


@pytest.mark.parametrize("method", list(METHODS))
def test_with_an_editor_off_the_base_answers_bit_for_bit(method):
    model, ids = writer(), torch.arange(20)[None]
    with torch.no_grad():
        base, seen = model(input_ids=ids).logits, []

    def edited(number, editor):
        with torch.no_grad():
            editor.model.eval()
            for off in (False, True, False):
                with editor.off() if off else contextlib.nullcontext():
                    seen.append(editor.model(input_ids=ids).logits)

    run("batch", method, EDITS[:2], model, reference=False, on_edited=edited)
    on, off, again = seen
    assert torch.equal(off, base)
    assert torch.equal(on, again)
    assert not torch.equal(on, base)
