"""`train.start_from`: every method carries on from the adapter that it is given, on a base that nobody touched."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hiplora.data.texts import ROW_LENGTH
from hiplora.errors import ConfigError, HipLoraError
from hiplora.provenance import file_sha256
from hiplora.training import train
from hiplora.training.widen import written_by
from tests.integration.training import StopAt, Stopped, assert_equal_runs, small_recipe, small_rows, tensors
from tests.tiny import save_tiny, tiny_llama, tiny_tokenizer

METHODS = {
    "hiplora": {"name": "hiplora", "preset": "paper", "principal_rank": 8},
    "activation": {"name": "hiplora", "principal_rank": 8, "calibration_tokens": 512},
    "energy": {"name": "proj_lora", "principal_rank": "energy:0.5", "basis": "weight", "projection": "hard"},
    "soft": {"name": "proj_lora", "principal_rank": 8, "projection": "soft", "calibration_tokens": 512},
    "lora": {"name": "lora", "modules_to_save": ["lm_head"]},
    "pissa": {"name": "pissa", "r": 4, "rank_pattern": {"q_proj": 3}, "modules_to_save": ["lm_head"]},
    "corda": {"name": "corda", "r": 4, "calibration_tokens": 512},
    "osf": {"name": "osf", "effective_rank": 0.25},
    "split_lora": {"name": "split_lora", "clients": 2, "cut_layer": 1, "average_every": 2},
}
SETTINGS = {"steps": 4, "max_length": 96, "save_every": 2, "log_every": 1, "weight_decay": 0.01}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("continual")


@pytest.fixture(scope="module")
def recipe(tiny_model_dir, folder):
    """Recipes of two tasks."""
    rows = [small_rows(folder / f"{task}.jsonl", task=task) for task in ("Say", "Ask")]

    def make(method, task=0, start=None, **settings):
        method = METHODS[method] if isinstance(method, str) else method
        settings = {**SETTINGS, "start_from": start, **settings}
        return small_recipe(tiny_model_dir, rows[task], method, seed=7 + task, **settings)

    return make


@pytest.fixture(scope="module")
def first(recipe, folder):
    """The adapter of the first task, of each method made once."""

    def adapter_of(method):
        out = folder / f"first-{method}"
        return out if out.exists() else train(recipe(method), out).adapter

    return adapter_of


def update(out, base_dir):
    """What an adapter does to the untouched base, by PEFT's own loading: parameter → difference, dense."""
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    merged = peft.PeftModel.from_pretrained(base, out).merge_and_unload()
    return {name: p.detach() - before[name] for name, p in merged.named_parameters()}


def largest(one, other=None):
    return max((one[name] - (other[name] if other else 0)).abs().max().item() for name in one)


@pytest.mark.parametrize("method", METHODS)
def test_a_training_that_hardly_moves_ends_at_the_adapter_that_it_was_given(
    recipe, first, tmp_path, tiny_model_dir, method
):
    start = first(method)
    result = train(recipe(method, 1, start, lr=1e-12, weight_decay=0, steps=2), tmp_path / "out")
    there, here = update(start, tiny_model_dir), update(result.adapter, tiny_model_dir)
    assert largest(there) > 1e-3
    assert largest(here, there) < 1e-6
    old, new = ({name: value.shape for name, value in tensors(out).items()} for out in (start, result.adapter))
    assert (old != new) == (method == "activation")  # which is widened


def test_a_widened_training_adds_a_part_that_keeps_out_of_what_the_finished_task_needs(recipe, first, tmp_path):
    folders = [first("activation")]
    for stage in (1, 2):
        folders.append(train(recipe("activation", stage % 2, folders[-1]), tmp_path / str(stage)).adapter)
    files = [tensors(folder) for folder in folders]
    bases = [load_file(folder / "basis.safetensors") for folder in folders[1:]]
    name = next(key for key in files[0] if ".hiplora_A" in key)
    module = name.removeprefix("base_model.model.").partition(".hiplora_A")[0]
    V = [files[0][f"base_model.model.{module}.hiplora_V"], *(basis[f"{module}.V"] for basis in bases)]
    A = [one[name] for one in files]
    r = len(A[0])
    assert [len(one) for one in A] == [r, 2 * r, 3 * r]
    assert [one.shape[1] for one in V] == [8, 16, 24]
    for stage in (1, 2):
        assert torch.equal(A[stage][: stage * r], A[stage - 1])
        assert (A[stage][stage * r :] @ V[stage]).norm() < 1e-4 * A[stage].norm()  # the new part keeps out of it
        assert (V[stage] @ (V[stage].T @ V[stage - 1]) - V[stage - 1]).norm() < 1e-4  # which holds what was protected
    assert (A[0] @ V[1]).norm() > 0.1 * A[0].norm()  # and the finished task
    with pytest.raises(ConfigError, match="was widened before"):
        train(recipe("activation", 0, folders[-1], widen=False), tmp_path / "other")


def test_a_widened_training_needs_the_rows_of_the_finished_task_and_no_other_file_of_it(recipe, first, tmp_path):
    start = Path(shutil.copytree(first("activation"), tmp_path / "given"))
    values = yaml.safe_load((start / "recipe.yaml").read_text())
    values["data"] |= {"held_out": "/gone.jsonl", "held_out_fraction": None}
    values["train"]["start_from"] = "/gone"
    (start / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert train(recipe("activation", 1, start, steps=1), tmp_path / "out").steps == 1


def test_no_padding_is_measured_after_an_answer_that_a_chat_models_own_token_ends(first):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(128)]
    written = written_by(model, tokenizer, first("activation"), 2048)
    answers = [row for row in written if len(row) < ROW_LENGTH]
    assert len(answers) == 8
    assert not any(tokenizer.pad_token_id in row for row in answers)


def test_a_widened_training_keeps_the_modules_that_it_trained_whole(recipe, tmp_path):
    method = {**METHODS["activation"], "modules_to_save": ["lm_head"]}
    first = train(recipe(method, 0, steps=4), tmp_path / "first").adapter
    result = train(recipe(method, 1, first, steps=4), tmp_path / "second")
    head = [next(t for name, t in tensors(folder).items() if "lm_head" in name) for folder in (first, result.adapter)]
    assert not torch.equal(*head)


def test_a_widened_training_has_no_base_to_measure_drift_from(recipe, first):
    with pytest.raises(ValueError, match=r"set `train\.widen: false`"):
        recipe("activation", 1, first("activation"), max_drift=0.5, drift_tokens=64)


@pytest.mark.parametrize("method", ["soft", "pissa"])
def test_training_on_changes_the_adapter_and_lowers_the_new_tasks_loss(
    recipe, first, tmp_path, tiny_model_dir, method
):
    start = first(method)
    before = file_sha256(start / "adapter_model.safetensors")
    result = train(recipe(method, 1, start), tmp_path / "out")
    assert result.held_out["after"] < result.held_out["before"]
    assert largest(update(result.adapter, tiny_model_dir), update(start, tiny_model_dir)) > 1e-3
    origin = json.loads((result.adapter / "provenance.json").read_text())["data"]
    assert origin["start"] == {"folder": start.name, "sha256": before}
    assert file_sha256(start / "adapter_model.safetensors") == before
    assert str(start.parent) not in (result.adapter / "README.md").read_text()


def test_the_factors_are_the_given_adapters_and_are_not_measured_again(recipe, first, tmp_path, monkeypatch):
    start = first("soft")
    monkeypatch.setattr("hiplora.tuner.calibrate", None)
    result = train(recipe("soft", 1, start), tmp_path / "out")
    old, new = tensors(start), tensors(result.adapter)
    kinds = ("hiplora_U", "hiplora_sigma", "hiplora_V", "hiplora_shrink_V")
    factors = [name for name in old if name.endswith(kinds)]
    assert factors
    assert all(torch.equal(old[name], new[name]) for name in factors)
    configs = [json.loads((out / "adapter_config.json").read_text()) for out in (start, result.adapter)]
    assert configs[0]["calibration"] == configs[1]["calibration"] != {}


@pytest.mark.parametrize("method", ["activation", "corda"])
def test_a_killed_run_is_resumed_exactly(recipe, first, tmp_path, method):
    asked = recipe(method, 1, first(method))
    with pytest.raises(Stopped):
        train(asked, tmp_path / "parts", callbacks=[StopAt(3)])
    assert_equal_runs(train(asked, tmp_path / "parts"), train(asked, tmp_path / "whole"))


def test_an_adapter_that_does_not_fit_is_an_error_that_says_what_differs(recipe, first, tmp_path):
    start, out = first("lora"), tmp_path / "out"
    with pytest.raises(ConfigError, match="holds another adapter \\(method lora there, pissa here\\)"):
        train(recipe("pissa", 1, start), out)
    other = {"name": "lora", "r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    with pytest.raises(ConfigError, match=r"'v_proj'\] there, \['q_proj'\] here.*method\.r: 16 there, 4 here"):
        train(recipe(other, 1, start), out)
    asked = recipe("hiplora", 1, first("hiplora")).model_copy(update={"model": str(save_tiny(tmp_path / "m", 5))})
    with pytest.raises(HipLoraError, match="base model's weight is not the one"):
        train(asked, out)
    assert not out.exists()
    with pytest.raises(ConfigError, match=r"would delete train\.start_from"):
        train(recipe("lora", 1, start), start, overwrite=True)


def test_another_adapter_under_the_same_name_is_noticed_when_a_run_is_resumed(recipe, first, tmp_path):
    start = shutil.copytree(first("lora"), tmp_path / "given")
    with pytest.raises(Stopped):
        train(recipe("lora", 1, start), tmp_path / "out", callbacks=[StopAt(3)])
    weights = tensors(start)
    save_file({name: value * 2 for name, value in weights.items()}, start / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="changed since this run began, or the adapter"):
        train(recipe("lora", 1, start), tmp_path / "out")
