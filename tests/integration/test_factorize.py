"""`hiplora factorize`: what it fills and what it says; it may be stopped at any moment."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load

from hiplora import HipLoraConfig
from hiplora.spectral import cache
from hiplora.tuner import hip_layers
from tests.commands import quietly, succeed
from tests.tiny import save_tiny
from tests.unit.adapters.samples import base_model, save_tiny_gpt2


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Folder of an empty factor store, used by everything in the test."""
    monkeypatch.setenv("HIPLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "factors"


@pytest.fixture
def factorize(capsys, root):
    """Run the command; return its record."""
    return lambda *arguments: json.loads(succeed(capsys, "factorize", *arguments, "--json"))


@pytest.fixture
def no_decomposition(monkeypatch):
    def forbidden(*args, name, **kwargs):
        raise AssertionError(f"{name} was decomposed again")

    return lambda: monkeypatch.setattr(cache, "truncated_svd", forbidden)


@pytest.mark.parametrize(
    ("family", "targets"),
    [("llama", None), ("llama", "all-linear"), ("gpt2", None), ("gpt2", r".*\.1\..*(c_attn|_proj)")],
)
def test_training_finds_in_the_store_what_it_adapts_and_nothing_else(
    tmp_path, root, factorize, family, targets, no_decomposition
):
    folder = save_tiny(tmp_path / "model")  # with a tokenizer
    if family == "gpt2":
        save_tiny_gpt2(folder)
    model = base_model(folder)
    record = factorize(folder, "--rank", 8, *(["--target-modules", targets] if targets else []))
    no_decomposition()
    config = HipLoraConfig(preset="paper", principal_rank=8, target_modules=targets)
    layers = dict(hip_layers(peft.get_peft_model(model, config)))
    assert {layer["name"]: layer["k"] for layer in record["layers"]} == dict.fromkeys(layers, 8)
    assert all(layer["residual"] <= 1e-4 for layer in record["layers"])
    assert len(list(root.rglob("*.safetensors"))) == len(layers)


def test_a_second_run_keeps_everything_and_makes_a_damaged_entry_anew(tiny_model_dir, factorize, root):
    assert not any(layer["reused"] for layer in factorize(tiny_model_dir, "--rank", 8)["layers"])
    entries = sorted(root.rglob("*.safetensors"))
    before = {path: path.stat().st_mtime_ns for path in entries}
    assert [layer["reused"] for layer in factorize(tiny_model_dir, "--rank", 8)["layers"]] == [True] * 8
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.safetensors")} == before
    whole = entries[0].read_bytes()
    entries[0].write_bytes(whole[:-3] + b"xyz")
    with pytest.warns(UserWarning, match="cannot be read .* computing it again"):
        record = factorize(tiny_model_dir, "--rank", 8)
    assert sum(layer["reused"] for layer in record["layers"]) == 7
    assert entries[0].read_bytes() == whole


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_dtype_serves_a_model_that_is_trained_in_another_precision(tmp_path, factorize, no_decomposition, stored):
    """A checkpoint in half precision serves a float32 model as it is."""
    folder = save_tiny(tmp_path / "model", dtype=stored)
    trained = torch.float32 if stored == torch.bfloat16 else torch.bfloat16
    factorize(folder, "--rank", 8, *(["--dtype", "bfloat16"] if trained == torch.bfloat16 else []))
    no_decomposition()
    peft.get_peft_model(base_model(folder, dtype=trained), HipLoraConfig(preset="paper", principal_rank=8))


# Stops at the fourth call of a function and says so, for as long as the parent needs to send a signal.
STOP = """
import time
from hiplora import files
from hiplora.cli.main import main
from hiplora.spectral import cache
def stopping(function, calls=[0]):
    def wrapper(*args, **kwargs):
        calls[0] += 1
        if calls[0] == 4:
            print("ready", flush=True)
            time.sleep(60)
        return function(*args, **kwargs)
    return wrapper
"""
COMPUTING = STOP + "cache.truncated_svd = stopping(cache.truncated_svd)\n"
WRITING = STOP + "files.os.replace = stopping(files.os.replace)\n"


def start(script, model, root):
    command = [sys.executable, "-c", script + "main()", "factorize", str(model), "--rank", "8", "--json"]
    environment, pipe = {**os.environ, "HIPLORA_CACHE": str(root)}, subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "kill"), [(COMPUTING, signal.SIGINT), (COMPUTING, signal.SIGKILL), (WRITING, signal.SIGKILL)]
)
def test_a_stopped_run_is_carried_on_by_the_next(tiny_model_dir, tmp_path, script, kill):
    child = start(script, tiny_model_dir, tmp_path)
    assert child.stdout.readline() == "ready\n"
    child.send_signal(kill)
    said, errors = child.communicate(timeout=60)
    assert said == ""
    assert "Traceback" not in errors
    if kill == signal.SIGINT:
        assert child.returncode == 130
        assert "3 weights are in the store; run it again to go on" in errors
    entries = sorted((Path(tmp_path) / "factors").rglob("*.safetensors"))
    for entry in entries:
        load(entry.read_bytes())
    assert len(entries) == 3
    said, errors = start("from hiplora.cli.main import main\n", tiny_model_dir, tmp_path).communicate(timeout=120)
    assert sum(layer["reused"] for layer in json.loads(said)["layers"]) == 3
    assert not list(tmp_path.rglob("*.part"))


def test_of_a_launchers_processes_the_first_alone_runs_a_command_that_does_not_train(
    tiny_model_dir, root, monkeypatch, capsys
):
    monkeypatch.setenv("RANK", "1")
    assert quietly(capsys, "factorize", tiny_model_dir, "--rank", "8") == ""
    assert not root.exists()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    succeed(capsys, "factorize", tiny_model_dir, "--rank", "8")
    assert list(root.rglob("*.safetensors"))
    assert "WORLD_SIZE" not in os.environ  # else whatever trains would wait for the others
