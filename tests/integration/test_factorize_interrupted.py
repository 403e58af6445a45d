"""`hiplora factorize` stopped at any moment: nothing half-written is ever loaded, and a rerun carries on."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load

pytestmark = pytest.mark.slow

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
WHOLE = "from hiplora.cli.main import main\n"
COMPUTING = STOP + "cache.truncated_svd = stopping(cache.truncated_svd)\n"
WRITING = STOP + "files.os.replace = stopping(files.os.replace)\n"


def start(script, model, root, **options):
    command = [sys.executable, "-c", script + "main()", "factorize", str(model), "--rank", "8", "--json"]
    environment = {**os.environ, "HIPLORA_CACHE": str(root)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, **options)


def reused(model, root):
    """Run to the end; return how many weights there are and how many were stored already."""
    said, errors = start(WHOLE, model, root).communicate(timeout=120)
    layers = json.loads(said)["layers"]
    assert "error" not in errors
    assert not list(root.rglob("*.part"))
    return len(layers), sum(layer["reused"] for layer in layers)


def whole_entries(root):
    entries = sorted((Path(root) / "factors").rglob("*.safetensors"))
    for entry in entries:
        load(entry.read_bytes())
    return len(entries)


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
        assert "3 of 8 weights are in the store; run it again to go on" in errors
    assert whole_entries(tmp_path) == 3
    assert reused(tiny_model_dir, tmp_path) == (8, 3)


def test_a_write_that_fails_halfway_stops_it_cleanly(tiny_model_dir, tmp_path):
    """Entries are over 3 kB; a limit of 2 kB a file fails part of the way through one, like a full disk."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    child = start(WHOLE, tiny_model_dir, tmp_path, preexec_fn=limit)
    said, errors = child.communicate(timeout=120)
    assert (child.returncode, said) == (1, "")
    assert errors.splitlines()[-1].startswith(f"error: cache {tmp_path / 'factors'}: cannot write")
    assert "HIPLORA_CACHE" in errors
    assert "Traceback" not in errors
    assert not list(tmp_path.rglob("*.part"))
    assert whole_entries(tmp_path) == 0
    assert reused(tiny_model_dir, tmp_path) == (8, 0)
