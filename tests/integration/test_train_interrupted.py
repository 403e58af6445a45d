"""kill -9, Ctrl-C and a full disk while training: nothing half-written is loaded, and a rerun carries on.

The interrupted runs live in forked processes, which have everything imported already; each is compared with a run that
nobody interrupted.
"""

import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hiplora.cli import main as frame
from hiplora.training import load_recipe, train
from hiplora.training.result import read_metrics
from hiplora.training.trainer import Record, checkpoints, step_of
from tests.tiny import write_jsonl

WRITTEN = {
    *("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
    *("trainer_state.json", "progress.json"),
}


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory, tiny_model_dir):
    folder = tmp_path_factory.mktemp("recipe")
    rows = [{"prompt": f"Say {n}: ", "completion": f"{n} it is"} for n in range(12)]
    write_jsonl(folder / "rows.jsonl", rows)
    recipe = {
        "model": str(tiny_model_dir),
        "data": {"path": "rows.jsonl"},
        "method": {"name": "hiplora", "preset": "paper", "principal_rank": 8},
        "train": {
            "steps": 6,
            "batch_size": 2,
            "gradient_accumulation": 1,
            "max_length": 64,
            "lr": 1e-2,
            "save_every": 2,
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


def numbers(rows):
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows]


def assert_nothing_half_written_loads(out):
    assert not (out / "adapter_config.json").exists()
    for checkpoint in checkpoints(out / "checkpoints"):
        assert {path.name for path in checkpoint.iterdir()} >= WRITTEN
        load_file(checkpoint / "adapter_model.safetensors")
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(checkpoint / name, weights_only=True)


def assert_carries_on(recipe_file, out, whole, caplog):
    steps = [step_of(path) for path in checkpoints(out / "checkpoints")]
    result = train(load_recipe(recipe_file), out)
    assert ("carrying on from step" in caplog.text) == bool(steps)
    assert numbers(result.metrics) == numbers(whole.metrics) == numbers(read_metrics(out))
    own, other = (load_file(folder / "adapter_model.safetensors") for folder in (out, whole.adapter))
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    assert not [path.name for path in out.rglob("*") if path.name.endswith((".part", ".old"))]
    return steps


def die():
    os.kill(os.getpid(), signal.SIGKILL)


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


def kill_in_on_save(nth):
    """Die when the `nth` checkpoint is written but not yet marked as whole."""
    original = Record.on_save

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 2 * nth:
            die()
        return original(self, args, state, control, **kwargs)

    Record.on_save = on_save


def kill_in_pruning(nth):
    """Die while the older checkpoint is removed."""
    shutil.rmtree = lambda path, *args, **kwargs: die() if "checkpoint-" in str(path) else None


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
    original = Record.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == nth:
            die()
        return original(self, args, state, control, **kwargs)

    Record.on_step_end = on_step_end


@pytest.mark.parametrize(
    ("kill", "nth", "last"),
    [
        (kill_in_step, 1, None),
        pytest.param(kill_in_step, 5, 4, marks=pytest.mark.slow),
        pytest.param(kill_in_torch_save, 1, None, marks=pytest.mark.slow),  # the first checkpoint's optimizer
        pytest.param(kill_in_torch_save, 6, 2, marks=pytest.mark.slow),  # a file of the second checkpoint
        (kill_in_on_save, 2, 2),
        pytest.param(kill_in_pruning, 1, 4, marks=pytest.mark.slow),
        pytest.param(kill_in_assembly, 1, 6, marks=pytest.mark.slow),
        (kill_in_assembly, 4, 6),  # everything is there but the file that completes the run
    ],
)
def test_a_kill_at_any_moment_leaves_a_run_that_carries_on(
    recipe_file, whole, tmp_path, caplog, kill, nth, last
):
    out = tmp_path / "out"

    def work():
        kill(nth)
        train(load_recipe(recipe_file), out)

    assert in_child(tmp_path / "log", work) == (None, signal.SIGKILL)
    assert_nothing_half_written_loads(out)
    steps = assert_carries_on(recipe_file, out, whole, caplog)
    assert (steps[-1] if steps else None) == last


def command(recipe_file, out):
    frame.main(["train", str(recipe_file), "--out", str(out)])


@pytest.mark.slow
def test_ctrl_c_exits_with_130_says_how_to_go_on_and_the_same_command_does(recipe_file, whole, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"

    def work():
        original = Record.on_step_end

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                os.kill(os.getpid(), signal.SIGINT)
            return original(self, args, state, control, **kwargs)

        Record.on_step_end = on_step_end
        command(recipe_file, out)

    assert in_child(log, work) == (130, None)
    said = log.read_text()
    assert "repeat the command to carry on" in said
    assert "Traceback" not in said
    assert_nothing_half_written_loads(out)
    assert in_child(log, lambda: command(recipe_file, out)) == (0, None)
    assert numbers(read_metrics(out)) == numbers(whole.metrics)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1_000, 50_000, 100_000])
def test_a_file_that_cannot_grow_is_an_error_and_the_run_carries_on_when_it_can(
    recipe_file, whole, tmp_path, caplog, limit
):
    """As on a full disk. The limit hits the recipe, the adapter or the optimizer's state."""
    out, log = tmp_path / "out", tmp_path / "log"

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        command(recipe_file, out)

    assert in_child(log, work) == (1, None)
    said = log.read_text()
    assert "cannot be written" in said
    assert "Traceback" not in said
    assert_nothing_half_written_loads(out)
    assert_carries_on(recipe_file, out, whole, caplog)
