"""kill -9, Ctrl-C and a full disk while training: nothing half-written is loaded, and a rerun carries on.

The interrupted runs live in forked processes, which have everything imported already; each is compared with a
run that nobody interrupted.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hiplora.cli import main as frame
from hiplora.training import sft, train
from hiplora.training.checkpoints import all_checkpoints
from hiplora.training.metrics import Record
from hiplora.training.recipe import load_recipe
from hiplora.training.result import read_metrics
from tests.tiny import write_jsonl

WRITTEN = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
}


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory, tiny_model_dir):
    folder = tmp_path_factory.mktemp("recipe")
    write_jsonl(
        folder / "rows.jsonl", [{"prompt": f"Say {n}: ", "completion": f"{n} it is"} for n in range(12)]
    )
    recipe = {
        "model": str(tiny_model_dir),
        "data": {"path": "rows.jsonl"},
        "method": {"name": "hiplora", "principal_rank": 8},
        "train": {
            "steps": 6,
            "batch_size": 2,
            "gradient_accumulation": 1,
            "max_length": 64,
            "lr": 1e-2,
            "save_every": 2,
            "keep_checkpoints": 2,
        },
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def whole(recipe_file, tmp_path_factory):
    """A run that nobody interrupts."""
    return train(load_recipe(recipe_file), tmp_path_factory.mktemp("whole") / "out")


def in_child(log, work):
    """Run `work` in a forked process, its output in `log`; return (exit status or None, signal or None)."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            sys.stdout = sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115 - the process ends before it
            signal.signal(signal.SIGINT, signal.default_int_handler)
            work()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return (None, os.WTERMSIG(status)) if os.WIFSIGNALED(status) else (os.WEXITSTATUS(status), None)


def command(recipe_file, out):
    frame.main(["train", str(recipe_file), "--out", str(out)])


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def assert_nothing_half_written_loads(out, tiny_model_dir):
    """No adapter in the folder, and every checkpoint that has its name is whole."""
    assert not (out / "adapter_config.json").exists()
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        peft.PeftModel.from_pretrained(base, str(out), local_files_only=True)
    for checkpoint in all_checkpoints(out / "checkpoints"):
        assert {path.name for path in checkpoint.iterdir()} >= WRITTEN
        load_file(checkpoint / "adapter_model.safetensors")
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(checkpoint / name, weights_only=True)


def numbers(rows):
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows]


def assert_carries_on(recipe_file, out, whole):
    """The same call again finishes the run, and the run is the one that nobody interrupted."""
    notes = []
    steps = [int(path.name.split("-")[1]) for path in all_checkpoints(out / "checkpoints")]
    result = train(load_recipe(recipe_file), out, on_note=notes.append)
    assert notes == ([f"carrying on from step {steps[-1]} of 6"] if steps else [])
    assert numbers(result.metrics) == numbers(whole.metrics) == numbers(read_metrics(out))
    own, other = (load_file(folder / "adapter_model.safetensors") for folder in (out, whole.adapter))
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    left = {path.name for folder in (out, out / "checkpoints") for path in folder.iterdir()}
    assert not [name for name in left if name.endswith((".part", ".old"))]


def kill_in_torch_save(nth):
    """Write half of the `nth` file that torch saves, and die."""
    original, calls = torch.save, [0]

    def save(value, path, *args, **kwargs):
        calls[0] += 1
        original(value, path, *args, **kwargs)
        if calls[0] == nth:
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    torch.save = save


def kill_in_rename(nth):
    """Die just before the `nth` checkpoint gets its name."""
    original, calls = os.replace, [0]

    def replace(source, target):
        if Path(target).name.startswith("step-"):
            calls[0] += 1
            if calls[0] == nth:
                die()
        original(source, target)

    os.replace = replace


def kill_in_assembly(nth):
    """Die before the `nth` file of the result takes its place."""
    original, calls = Path.replace, [0]

    def replace(self, target):
        if self.parent.name == ".final.part":
            calls[0] += 1
            if calls[0] == nth:
                die()
        return original(self, target)

    Path.replace = replace


def kill_in_step(nth):
    """Die in the middle of the `nth` optimizer step."""
    original = Record.end_step

    def end_step(self, step, lr):
        if step == nth:
            die()
        return original(self, step, lr)

    Record.end_step = end_step


def kill_before_training(nth):
    sft.build_trainer = lambda *args: die()


@pytest.mark.parametrize(
    ("kill", "nth"),
    [
        (kill_before_training, 1),
        (kill_in_step, 1),
        (kill_in_step, 5),
        (kill_in_torch_save, 1),  # the first checkpoint's optimizer
        (kill_in_torch_save, 6),  # the second checkpoint's random state
        (kill_in_rename, 3),
        (kill_in_assembly, 1),
        (kill_in_assembly, 4),  # everything is there but the file that completes the run
    ],
)
def test_a_kill_at_any_moment_leaves_a_run_that_carries_on(
    recipe_file, whole, tmp_path, tiny_model_dir, kill, nth
):
    out = tmp_path / "out"

    def work():
        kill(nth)
        train(load_recipe(recipe_file), out)

    assert in_child(tmp_path / "log", work) == (None, signal.SIGKILL)
    assert_nothing_half_written_loads(out, tiny_model_dir)
    assert_carries_on(recipe_file, out, whole)


def test_kills_at_random_moments_one_after_the_other(recipe_file, whole, tmp_path, tiny_model_dir):
    out = tmp_path / "out"

    def work():
        train(load_recipe(recipe_file), out, on_step=lambda row: time.sleep(0.02))

    for attempt in range(4):
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                work()
            os._exit(0)
        time.sleep(0.35 + 0.37 * attempt)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if (out / "adapter_config.json").exists():
            break
        if out.exists():
            assert_nothing_half_written_loads(out, tiny_model_dir)
    if not (out / "adapter_config.json").exists():
        assert_carries_on(recipe_file, out, whole)


def test_ctrl_c_exits_with_130_says_how_to_go_on_and_the_same_command_does(
    recipe_file, whole, tmp_path, tiny_model_dir
):
    out, log = tmp_path / "out", tmp_path / "log"

    def work():
        original = Record.end_step

        def end_step(self, step, lr):
            if step == 4:
                os.kill(os.getpid(), signal.SIGINT)
            return original(self, step, lr)

        Record.end_step = end_step
        command(recipe_file, out)

    assert in_child(log, work) == (130, None)
    said = log.read_text()
    assert "give the same command again to carry on" in said
    assert "Traceback" not in said
    assert_nothing_half_written_loads(out, tiny_model_dir)
    assert in_child(log, lambda: command(recipe_file, out)) == (0, None)
    assert "carrying on from step 2 of 6" in log.read_text()
    assert numbers(read_metrics(out)) == numbers(whole.metrics)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few hundred KiB, and a way to make it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options):
        return subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)], capture_output=True
        ).returncode

    if mount("size=256k"):
        pytest.skip("no permission to mount a tmpfs here; the limit on file sizes below tests the same")
    try:
        yield folder, lambda: mount("remount", "size=64m")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_said_and_the_run_carries_on_when_there_is_room(
    recipe_file, whole, tmp_path, tiny_model_dir, small_disk
):
    disk, enlarge = small_disk
    out, log = disk / "out", tmp_path / "log"
    assert in_child(log, lambda: command(recipe_file, out)) == (1, None)
    said = log.read_text()
    assert "cannot be written" in said
    assert "make room and run the same command again" in said
    assert "Traceback" not in said
    assert_nothing_half_written_loads(out, tiny_model_dir)
    assert enlarge() == 0
    assert_carries_on(recipe_file, out, whole)


@pytest.mark.parametrize("limit", [1_000, 50_000, 100_000])
def test_a_file_that_may_not_grow_is_said_and_the_run_carries_on_without_the_limit(
    recipe_file, whole, tmp_path, tiny_model_dir, limit
):
    """The limit hits the recipe, the adapter or the optimizer's state."""
    out, log = tmp_path / "out", tmp_path / "log"

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        command(recipe_file, out)

    assert in_child(log, work) == (1, None)
    said = log.read_text()
    assert "cannot be written" in said
    assert "Traceback" not in said
    assert_nothing_half_written_loads(out, tiny_model_dir)
    assert_carries_on(recipe_file, out, whole)
