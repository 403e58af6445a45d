"""Training under torchrun: two processes share the global batch of the recipe, and the first one writes."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from hiplora.errors import ConfigError
from hiplora.training import train
from hiplora.training.reading import load_recipe
from hiplora.training.result import TrainResult
from hiplora.training.trainer import Record, last_checkpoint
from tests.integration.training import recipe_file
from tests.tiny import write_jsonl

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
    printed = json.loads(done.stdout)  # one process prints
    assert (printed["steps"], printed["tokens"]) == (single.steps, single.tokens)
    assert printed["held_out"] == pytest.approx(single.held_out, rel=1e-4)
    assert printed["final_loss"] == pytest.approx(single.final_loss, rel=1e-4)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("single", "double"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_comparison_in_two_processes_equals_that_in_one(tmp_path, tiny_model_dir):
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"The tide at {i} is {i * i}."} for i in range(40)])
    options = ["--steps", "4", "--rank", "2", "--principal-rank", "8", "--max-length", "64"]
    options, results = [*options, "--methods", "lora,hiplora"], {}
    for processes in (1, 2):
        out = tmp_path / f"of-{processes}"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += ["-m", "hiplora", "compare", tiny_model_dir, data, "--out", out, *options]
        done = subprocess.run([*map(str, command), "--json"], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        results[processes] = json.loads(done.stdout)  # one process prints
    one, two = ({name: run["trained"] for name, run in results[count]["methods"].items()} for count in (1, 2))
    assert one.keys() == two.keys()
    for name, points in one.items():
        losses = [[point["held_out_loss"] for point in trained] for trained in (points, two[name])]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        assert losses[0][-1] < losses[0][0]


def test_processes_that_cannot_share_the_batch_are_refused(tmp_path, tiny_model_dir, monkeypatch):
    recipe = load_recipe(recipe_file(tmp_path, tiny_model_dir, "lora", **SETTINGS))
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="gradient_accumulation 4 is no multiple of the 3 processes"):
        train(recipe, tmp_path / "out")


@pytest.mark.parametrize("sharded", ["FSDP", "DEEPSPEED"])
def test_launchers_that_shard_the_model_are_refused(tmp_path, tiny_model_dir, monkeypatch, sharded):
    recipe = load_recipe(recipe_file(tmp_path, tiny_model_dir, "lora", **SETTINGS))
    monkeypatch.setenv(f"ACCELERATE_USE_{sharded}", "true")
    with pytest.raises(ConfigError, match=f"ACCELERATE_USE_{sharded} is set, .* launch it without"):
        train(recipe, tmp_path / "out")


def worker(rank, processes, port, file, out, last):
    """Train as one of several processes; all of them die after step `last`, as with the machine."""
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    note = Record.on_step_end

    def on_step_end(self, args, state, *more, **options):
        note(self, args, state, *more, **options)
        if state.global_step == last:
            os._exit(9)

    Record.on_step_end = on_step_end
    train(load_recipe(file), out)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_an_interrupted_run_goes_on_with_another_number_of_processes(tmp_path, tiny_model_dir, before, after):
    method = {"name": "hiplora", "preset": "paper", "principal_rank": 8, "r": 4, "lora_dropout": 0.0}
    file = recipe_file(tmp_path, tiny_model_dir, method, **SETTINGS)
    single, out = train(load_recipe(file), tmp_path / "single"), tmp_path / "out"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="exit code 9"):
        torch.multiprocessing.spawn(worker, args=(before, port, file, out, 4), nprocs=before)
    assert last_checkpoint(out / "checkpoints").name == "checkpoint-3"
    torch.multiprocessing.spawn(worker, args=(after, port, file, out, -1), nprocs=after)
    result = TrainResult.read(out)
    assert (result.steps, result.tokens) == (single.steps, single.tokens)
    assert result.held_out == pytest.approx(single.held_out, rel=1e-4)
    one, other = (load_file(at / "adapter_model.safetensors") for at in (tmp_path / "single", out))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-5)
