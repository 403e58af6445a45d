"""`hiplora factorize` stopped at any moment: nothing half-written is ever loaded, and a rerun carries on."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from safetensors.torch import load as _decode

from hiplora.cli import main as cli

# Stops at a chosen moment and says so, for as long as the parent needs to send a signal.
STOP = """
import os, sys, time
from hiplora import files
from hiplora.cli.main import main
from hiplora.spectral import cache as store
calls = 0
def stopping(function, when):
    def wrapper(*args, **kwargs):
        global calls
        calls += 1
        if calls == when:
            print("ready", flush=True)
            time.sleep(60)
        return function(*args, **kwargs)
    return wrapper
"""
COMPUTING = STOP + "store.truncated_svd = stopping(store.truncated_svd, 4)\nmain()"
WRITING = STOP + "files.os.replace = stopping(os.replace, 4)\nmain()"


def start(script, model, cache, **options):
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(script),
        "factorize",
        str(model),
        "--rank",
        "8",
        "--json",
    ]
    return subprocess.Popen(
        command,
        env={**os.environ, "HIPLORA_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def reused(record):
    return len(record["layers"]), sum(layer["reused"] for layer in record["layers"])


@pytest.fixture
def finish(capsys, monkeypatch, tiny_model_dir):
    """Run to the end, in this process; return what it printed."""

    def finish(cache):
        monkeypatch.setenv("HIPLORA_CACHE", str(cache))
        monkeypatch.setattr(
            sys, "argv", ["hiplora", "factorize", str(tiny_model_dir), "--rank", "8", "--json"]
        )
        with contextlib.suppress(SystemExit):
            cli.main()
        said, errors = capsys.readouterr()
        assert "error" not in errors
        return json.loads(said)

    return finish


def entries(cache):
    return sorted((Path(cache) / "factors").rglob("*.safetensors"))


def leftovers(cache):
    return list((Path(cache) / "factors").rglob("*.part"))


def assert_all_whole(cache):
    for entry in entries(cache):
        _decode(entry.read_bytes())


@pytest.mark.parametrize(
    ("script", "kill"), [(COMPUTING, signal.SIGINT), (COMPUTING, signal.SIGKILL), (WRITING, signal.SIGKILL)]
)
def test_a_stopped_run_is_carried_on_by_the_next(tiny_model_dir, tmp_path, finish, script, kill):
    child = start(script, tiny_model_dir, tmp_path)
    assert child.stdout.readline() == "ready\n"
    child.send_signal(kill)
    said, errors = child.communicate(timeout=60)
    assert said == ""
    assert "Traceback" not in errors
    if kill == signal.SIGINT:
        assert child.returncode == 130
        assert "3 of 8 weights are in the store; run it again to go on" in errors
    else:
        assert child.returncode == -kill
    assert len(entries(tmp_path)) == 3
    assert_all_whole(tmp_path)
    assert len(leftovers(tmp_path)) == (script is WRITING)
    before = {entry: entry.stat().st_mtime_ns for entry in entries(tmp_path)}

    record = finish(tmp_path)
    assert reused(record) == (8, 3)
    assert all(entry.stat().st_mtime_ns == time for entry, time in before.items())
    assert leftovers(tmp_path) == []


def assert_full(child, cache):
    """It failed with a sentence, exit status 1, and left nothing half-written."""
    said, errors = child.communicate(timeout=120)
    assert child.returncode == 1
    assert said == ""
    assert errors.splitlines()[-1].startswith(f"error: cache {Path(cache) / 'factors'}: cannot write")
    assert "HIPLORA_CACHE" in errors
    assert "Traceback" not in errors
    assert leftovers(cache) == []
    assert_all_whole(cache)


def test_a_file_size_limit_stops_it_cleanly(tiny_model_dir, tmp_path, finish):
    """Entries are over 3 kB; writing more than 2 kB of one fails part of the way through, like a full disk."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    child = start("from hiplora.cli.main import main; main()", tiny_model_dir, tmp_path, preexec_fn=limit)
    assert_full(child, tmp_path)
    assert entries(tmp_path) == []
    assert reused(finish(tmp_path)) == (8, 0)


@contextlib.contextmanager
def small_disk(folder, size):
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs is Linux's")
def test_a_full_disk_stops_it_cleanly_and_more_space_lets_it_go_on(tiny_model_dir, tmp_path, finish):
    with small_disk(tmp_path / "disk", "24k") as disk:
        assert_full(start("from hiplora.cli.main import main; main()", tiny_model_dir, disk), disk)
        done = len(entries(disk))
        assert 0 < done < 8
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        record = finish(disk)
        assert reused(record) == (8, done)


@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs is Linux's")
def test_training_goes_on_where_the_disk_is_full(tiny_model_dir, tmp_path):
    script = """
        import sys, warnings, peft, torch
        from transformers import AutoModelForCausalLM
        from hiplora import HipLoraConfig
        warnings.simplefilter("ignore", FutureWarning)
        model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model = peft.get_peft_model(model, HipLoraConfig(principal_rank=8))
        print(sum("continuing without it" in str(warning.message) for warning in said))
    """
    with small_disk(tmp_path / "disk", "16k") as disk:
        child = start(script, tiny_model_dir, disk)
        said, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors
        assert int(said) > 0
        assert leftovers(disk) == []
        assert_all_whole(disk)
