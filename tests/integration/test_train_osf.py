"""OSF by PEFT: trained, saved as stock PEFT loads it, and read as the update that it is of the base on the disk."""

import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hiplora.adapters import read_update, save_as_lora, update_from_model
from hiplora.errors import AdapterError
from hiplora.evaluation.mounting import applied, mounted
from hiplora.merging import merge
from hiplora.training import train
from hiplora.training.methods import METHODS
from hiplora.training.recipe import TrainRecipe
from tests.tiny import save_tiny, write_jsonl

OSF = {"name": "osf", "effective_rank": 0.25, "rank_pattern": {"layers.1.*k_proj": 30}}
SETTINGS = {
    "steps": 8,
    "batch_size": 2,
    "gradient_accumulation": 1,
    "max_length": 96,
    "lr": 1e-2,
    "weight_decay": 0.0,
    "dtype": "fp32",
    "save_every": 3,
}


@pytest.fixture(scope="module")
def recipe(tiny_model_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    write_jsonl(path, [{"prompt": f"Say {n}: ", "completion": f"{n} it is"} for n in range(24)])

    def make(**settings):
        return TrainRecipe.model_validate(
            {
                "model": str(tiny_model_dir),
                "data": {"path": path, "held_out_fraction": 0.2},
                "method": OSF,
                "train": {**SETTINGS, **settings},
            }
        )

    return make


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    return train(recipe(), tmp_path_factory.mktemp("trained") / "out")


@pytest.fixture
def base(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir)


def tensors(out):
    return load_file(out / "adapter_model.safetensors")


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(40)[None] * 5 % 250).logits


def test_it_trains_and_says_how_many_parameters_it_trains(trained):
    assert trained.held_out["after"] < trained.held_out["before"]
    assert trained.trainable_parameters == sum(value.numel() for value in tensors(trained.adapter).values())
    config = json.loads((trained.adapter / "adapter_config.json").read_text())
    assert (config["peft_type"], config["effective_rank"]) == ("OSF", 0.25)


def test_merged_exported_and_applied_it_has_the_logits_of_the_mounted_adapter(trained, tmp_path, base):
    bare = logits(base)
    with mounted(base, trained.adapter) as model:
        expected = logits(model)
        live = update_from_model(model)
    assert (expected - bare).abs().max() > 1e-2
    assert torch.equal(logits(base), bare)
    update = read_update(trained.adapter)
    assert (update.kind, update.rank("model.layers.1.self_attn.k_proj")) == ("osf", 4)
    for name in update.modules:
        torch.testing.assert_close(update.delta(name), live.delta(name), atol=2e-6, rtol=0)
    with applied(base, update) as model:
        torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=0)
    save_as_lora(trained.adapter, tmp_path / "lora")
    save_as_lora(merge([trained.adapter]), tmp_path / "merged")
    for folder in ("lora", "merged"):
        with mounted(base, tmp_path / folder) as model:
            torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=0)


class Stopped(Exception):
    pass


def stop(row):
    if row["step"] == 4:
        raise Stopped


@pytest.mark.parametrize("continued", [False, True])
def test_a_killed_run_is_resumed_exactly(recipe, trained, tmp_path, continued):
    made = recipe(start_from=trained.adapter if continued else None)
    whole = train(made, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(made, tmp_path / "parts", on_step=stop)
    parts = train(made, tmp_path / "parts")
    one, other = tensors(whole.adapter), tensors(parts.adapter)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_training_that_hardly_moves_ends_at_the_adapter_that_it_carries_on_from(recipe, trained, tmp_path):
    result = train(recipe(start_from=trained.adapter, lr=1e-12, steps=2), tmp_path / "out")
    assert result.trainable_parameters == trained.trainable_parameters
    old, new = read_update(trained.adapter), read_update(result.adapter)
    for name in old.modules:
        assert old.delta(name).abs().max() > 1e-3
        torch.testing.assert_close(new.delta(name), old.delta(name), atol=1e-6, rtol=0)


def test_gradients_keep_out_of_the_protected_directions_of_the_base(base):
    """Gradients, not steps: AdamW scales each entry by itself, and so leaves the complement somewhat."""
    method = METHODS["osf"](effective_rank=0.25)
    model = get_peft_model(base, method.peft_config())
    model(torch.arange(30)[None], labels=torch.arange(30)[None]).loss.backward()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    U, _, _ = torch.linalg.svd(layer.base_layer.weight)
    gradient = layer.osf_svd_params["default"]["U_low"].grad
    assert (U[:, :16].T @ gradient).norm() < 1e-4 * gradient.norm()


def test_weight_decay_is_warned_of(recipe, tmp_path):
    notes = []
    train(recipe(weight_decay=0.01, steps=1), tmp_path / "out", on_note=notes.append)
    assert any("which train.weight_decay 0.01 shrinks" in note for note in notes)


def test_another_base_model_is_an_error(trained, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(save_tiny(tmp_path / "same"))
    config.hidden_size, config.num_attention_heads, config.head_dim = 32, 2, 16
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    with pytest.raises(
        AdapterError, match=r"the adapter is for a weight \(32, 64\), and the base model's is"
    ):
        read_update(trained.adapter, base=str(tmp_path / "other"))
