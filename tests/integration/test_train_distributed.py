"""Training under torchrun: two processes share the global batch of the recipe, and the first one writes."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from hiplora.errors import ConfigError
from hiplora.training import train
from hiplora.training.reading import load_recipe
from tests.integration.training import recipe_file

SETTINGS = {"rows": 40, "gradient_accumulation": 4, "packing": False, "save_every": 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        {"name": "lora"},
        {"name": "hiplora", "preset": "paper", "principal_rank": 8},
        {"name": "hiplora", "principal_rank": 8},
        {"name": "milora"},
    ],
    ids=lambda method: method["name"],
)
def test_two_processes_equal_one_of_the_same_global_batch(tmp_path, tiny_model_dir, method):
    file = recipe_file(tmp_path, tiny_model_dir, {"r": 4, "lora_dropout": 0.0, **method}, **SETTINGS)
    single = train(load_recipe(file), tmp_path / "single")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "hiplora", "train", str(file), "--out", str(tmp_path / "double"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)  # one process prints
    assert (told["steps"], told["tokens"]) == (single.steps, single.tokens)
    assert told["held_out"] == pytest.approx(single.held_out, rel=1e-4)
    assert told["final_loss"] == pytest.approx(single.final_loss, rel=1e-4)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("single", "double"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5)


def test_processes_that_cannot_share_the_batch_are_refused(tmp_path, tiny_model_dir, monkeypatch):
    recipe = load_recipe(recipe_file(tmp_path, tiny_model_dir, "lora", **SETTINGS))
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="gradient_accumulation 4 is no multiple of the 3 processes"):
        train(recipe, tmp_path / "out")
