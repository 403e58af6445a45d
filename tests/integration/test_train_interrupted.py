"""A kill and a full disk while training: nothing half-written is loaded, and a rerun carries on.

The interrupted runs live in forked processes, which have everything imported already; each is compared with a run that
nobody interrupted.
"""

import os
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainerState

from hiplora.cli import main as frame
from hiplora.training import load_recipe, train
from hiplora.training.trainer import Record, last_checkpoint
from tests.integration import training


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory, tiny_model_dir):
    method = {"preset": "paper", "principal_rank": 8}
    return training.recipe_file(
        tmp_path_factory.mktemp("recipe"), tiny_model_dir, method, gradient_accumulation=1, save_every=2
    )


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


def assert_carries_on(recipe_file, out, whole):
    """Nothing half-written loads, and the run ends as if nobody had interrupted it."""
    assert not (out / "adapter_config.json").exists()
    training.assert_equal_runs(train(load_recipe(recipe_file), out), whole)
    assert not list(out.rglob("*.part"))


def call_and_die(owner, name, nth):
    """Die at the `nth` call of a function; what it writes is half written."""
    original, calls = getattr(owner, name), [0]

    def call(*arguments, **options):
        calls[0] += 1
        if calls[0] < nth:
            return original(*arguments, **options)
        for path in arguments:
            if isinstance(path, (str, Path)) and name != "replace":
                original(*arguments, **options)
                os.truncate(path, os.path.getsize(path) // 2)
        return os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, call)


@pytest.mark.parametrize(
    ("owner", "name", "nth", "last"),
    [
        pytest.param(Record, "on_step_end", 1, None, marks=pytest.mark.slow),
        pytest.param(torch, "save", 1, None, marks=pytest.mark.slow),  # the first checkpoint's optimizer
        pytest.param(torch, "save", 6, 2, marks=pytest.mark.slow),  # a file of the second checkpoint
        (TrainerState, "save_to_json", 2, 2),  # the last file of the second checkpoint
        pytest.param(Path, "replace", 1, 6, marks=pytest.mark.slow),
        (Path, "replace", 4, 6),  # everything is there but the file that completes the run
    ],
)
def test_a_kill_at_any_moment_leaves_a_run_that_carries_on(recipe_file, whole, tmp_path, owner, name, nth, last):
    def work():
        call_and_die(owner, name, nth)
        train(load_recipe(recipe_file), tmp_path / "out")

    assert in_child(tmp_path / "log", work) == (None, signal.SIGKILL)
    checkpoint = last_checkpoint(tmp_path / "out" / "checkpoints")
    assert (int(checkpoint.name.rpartition("-")[2]) if checkpoint else None) == last
    assert_carries_on(recipe_file, tmp_path / "out", whole)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1_000, 50_000])
def test_a_file_that_cannot_grow_is_an_error_and_the_run_carries_on_when_it_can(recipe_file, whole, tmp_path, limit):
    """As on a full disk. The limit hits the recipe or the adapter."""

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        frame.main(["train", str(recipe_file), "--out", str(tmp_path / "out")])

    assert in_child(tmp_path / "log", work) == (1, None)
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert_carries_on(recipe_file, tmp_path / "out", whole)
