"""AdaLoRA by PEFT: pruned as PEFT's own loop prunes it, resumed exactly, and read by everything that reads adapters."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hiplora.adapters import read_update, save_as_lora
from hiplora.errors import ConfigError
from hiplora.evaluation.mounting import mounted
from hiplora.merging import merge
from hiplora.training import train, trainer
from hiplora.training.methods import METHODS
from hiplora.training.recipe import TrainRecipe
from hiplora.training.result import read_metrics
from tests.tiny import write_jsonl

ADALORA = {"name": "adalora", "r": 2, "init_r": 6, "tinit": 1, "tfinal": 2, "lora_dropout": 0.0}
SETTINGS = {
    "steps": 8,
    "batch_size": 2,
    "gradient_accumulation": 2,
    "max_length": 96,
    "lr": 2e-2,
    "weight_decay": 0.1,
    "dtype": "fp32",
    "save_every": 3,
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    return write_jsonl(path, [{"prompt": f"Say {n}: ", "completion": f"{n} it is"} for n in range(24)])


@pytest.fixture(scope="module")
def recipe(tiny_model_dir, rows):
    def make(method=(), **settings):
        return TrainRecipe.model_validate(
            {
                "model": str(tiny_model_dir),
                "data": {"path": rows, "held_out_fraction": 0.2},
                "method": {**ADALORA, **dict(method)},
                "train": {**SETTINGS, **settings},
            }
        )

    return make


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    return train(recipe(), tmp_path_factory.mktemp("trained") / "out")


def tensors(out):
    return load_file(out / "adapter_model.safetensors")


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(40)[None] * 5 % 250).logits


def test_ranks_are_pruned_to_r_on_average_and_the_loss_falls(trained):
    ranks = [value.shape[0] for name, value in tensors(trained.adapter).items() if "lora_A" in name]
    assert sum(ranks) == 2 * len(ranks)
    assert trained.held_out["after"] < trained.held_out["before"]
    config = json.loads((trained.adapter / "adapter_config.json").read_text())
    assert (config["init_r"], config["target_r"], config["total_step"]) == (6, 2, 8)
    assert (config["tinit"], config["tfinal"], config["orth_reg_weight"]) == (1, 2, 0.5)


def test_the_adapter_is_mounted_merged_and_exported_with_the_same_logits(trained, tmp_path, tiny_model_dir):
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    bare = logits(base)
    with mounted(base, trained.adapter) as model:
        expected = logits(model)
    assert (expected - bare).abs().max() > 1e-2
    assert torch.equal(logits(base), bare)
    update = read_update(trained.adapter)
    assert update.kind == "adalora"
    save_as_lora(trained.adapter, tmp_path / "lora")
    save_as_lora(merge([trained.adapter]), tmp_path / "merged")
    for folder in ("lora", "merged"):
        with mounted(base, tmp_path / folder) as model:
            torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=0)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("settings", [{}, {"log_every": 2}])
@pytest.mark.parametrize("step", [4, 8])
def test_a_killed_run_is_resumed_exactly(recipe, tmp_path, step, settings):
    """What is masked at step 3 may come back later; at step 8 nothing is left but to save the result."""

    def stop(row):
        if row["step"] == step and step < 8:
            raise Stopped

    made = recipe(**settings)
    whole = train(made, tmp_path / "whole")
    if step < 8:
        with pytest.raises(Stopped):
            train(made, tmp_path / "parts", on_step=stop)
    else:
        train(made, tmp_path / "parts")
        (tmp_path / "parts" / "adapter_config.json").unlink()
    notes = []
    parts = train(made, tmp_path / "parts", on_note=notes.append)
    assert notes == [f"carrying on from step {3 if step < 8 else 8} of 8"]
    one, other = tensors(whole.adapter), tensors(parts.adapter)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    timing = ("seconds", "tokens_per_second")
    first, second = (
        [{k: v for k, v in row.items() if k not in timing} for row in read_metrics(out)]
        for out in (whole.adapter, parts.adapter)
    )
    assert first == second


def test_the_steps_are_those_of_peft_s_own_loop(recipe, tmp_path, tiny_model_dir):
    """One batch a step, so that PEFT's price, which its forward adds to every batch's loss, counts once too."""
    made = recipe(batch_size=1, gradient_accumulation=1, packing=False, warmup_ratio=0, steps=6)
    seen = []
    keep = trainer.RecordingTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            seen.append({name: inputs[name].clone() for name in ("input_ids", "labels")})
        return keep(self, model, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.RecordingTrainer, "compute_loss", compute_loss)
        result = train(made, tmp_path / "out")
    torch.manual_seed(made.seed)
    from transformers import set_seed

    set_seed(made.seed)
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model_dir),
        made.method.peft_config(6),
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=made.train.lr, weight_decay=0.1)
    losses = []
    for step, inputs in enumerate(seen):
        loss = model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    rows = [row for row in result.metrics if "loss" in row]
    assert [row["loss"] + 0.5 * row["orthogonality"] for row in rows] == pytest.approx(losses, rel=1e-4)
    expected = peft.get_peft_model_state_dict(model)
    for name, value in tensors(result.adapter).items():
        torch.testing.assert_close(value, expected[name].detach(), atol=2e-4, rtol=2e-3)


def test_the_loss_is_the_task_s_on_either_path(recipe, trained, tmp_path, monkeypatch):
    """Where TRL computes it, as on a GPU, PEFT's forward would add its price."""
    monkeypatch.setattr(trainer, "LOGITS_LIMIT", 0)
    other = train(recipe(), tmp_path / "out")
    for row, same in zip(other.metrics[:3], trained.metrics[:3], strict=True):
        assert row.get("loss", 0) == pytest.approx(same.get("loss", 0), rel=1e-4)
        assert row.get("held_out_loss", 0) == pytest.approx(same.get("held_out_loss", 0), rel=1e-4)


def test_an_adapter_that_is_carried_on_keeps_its_ranks(recipe, trained, tmp_path):
    result = train(recipe(start_from=trained.adapter, steps=3), tmp_path / "out")
    old, new = tensors(trained.adapter), tensors(result.adapter)
    assert {name: value.shape for name, value in old.items()} == {
        name: value.shape for name, value in new.items()
    }
    kept = sum(value.numel() for value in old.values())
    assert result.trainable_parameters == kept
    configs = [
        json.loads((out / "adapter_config.json").read_text()) for out in (trained.adapter, result.adapter)
    ]
    assert configs[0]["rank_pattern"] == configs[1]["rank_pattern"]
    assert configs[1]["total_step"] == 8


def test_the_schedule_has_sensible_shares():
    method = METHODS["adalora"](r=8)
    assert method.first_rank == 12
    plan = method.schedule(2000)
    assert (plan.total_step, plan.tinit, plan.tfinal, plan.deltaT) == (2000, 200, 400, 10)
    short = method.schedule(20)
    assert (short.tinit, short.tfinal, short.deltaT) == (2, 4, 1)


@pytest.mark.parametrize(
    ("method", "train_settings", "message"),
    [
        ({"tinit": 5, "tfinal": 3}, {}, "leave none of 8 steps to prune in"),
        ({"init_r": 2}, {}, "`init_r` 2 must be above `r` 2"),
        ({"rank_pattern": {"q_proj": 3}}, {}, "`rank_pattern` has no use with adalora"),
        ({"target_r": 4}, {}, "`target_r` 4 and `r` 2 mean the same"),
    ],
)
def test_settings_that_make_no_sense_are_errors(recipe, method, train_settings, message):
    with pytest.raises(ValueError, match=message):
        recipe(method, **train_settings)


def test_peft_s_name_of_the_rank_is_understood():
    assert METHODS["adalora"].model_validate({"target_r": 4}).r == 4


def test_a_schedule_that_epochs_leave_no_room_for_is_an_error(recipe, tmp_path):
    made = recipe({"tinit": 50}, steps=None, epochs=1)
    with pytest.raises(ConfigError, match="tinit 50 and tfinal 2 leave none of"):
        train(made, tmp_path / "out")


def test_whoever_does_not_prune_is_refused():
    with pytest.raises(ConfigError, match="only `hiplora train` does"):
        METHODS["adalora"]().peft_config()
