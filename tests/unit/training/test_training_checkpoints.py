"""Checkpoints are whole or absent, whatever happens while they are written or removed."""

import errno
import os
import signal
from pathlib import Path

import pytest

from hiplora.training.checkpoints import all_checkpoints, prune, remove, staged, step_of, sweep, writing


def in_child(work):
    """Run `work` in a forked process; return how it ended."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return status


def make(folder, step, text="x"):
    with staged(folder / f"step-{step}") as aside:
        (aside / "a").write_text(text)
    return folder / f"step-{step}"


def test_a_checkpoint_appears_whole(tmp_path):
    with staged(tmp_path / "step-3") as aside:
        (aside / "deep").mkdir()
        (aside / "deep" / "a").write_text("x")
        assert all_checkpoints(tmp_path) == []
    assert (tmp_path / "step-3" / "deep" / "a").read_text() == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]


def test_a_checkpoint_that_exists_is_replaced(tmp_path):
    make(tmp_path, 3, "old")
    make(tmp_path, 3, "new")
    assert (tmp_path / "step-3" / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x"), RuntimeError("file write failed")])
def test_a_failure_leaves_nothing_behind(tmp_path, error):
    make(tmp_path, 2)
    with pytest.raises((KeyboardInterrupt, ValueError, OSError)), staged(tmp_path / "step-3") as aside:
        (aside / "a").write_text("half")
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]


def test_a_kill_while_writing_leaves_no_checkpoint_and_is_swept_up(tmp_path):
    make(tmp_path, 2)

    def work():
        with staged(tmp_path / "step-3") as aside:
            (aside / "a").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert os.WTERMSIG(in_child(work)) == signal.SIGKILL
    assert [path.name for path in all_checkpoints(tmp_path)] == ["step-2"]
    assert len(list(tmp_path.iterdir())) == 2
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]


def test_a_kill_while_removing_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    make(tmp_path, 2)

    def work():
        import shutil

        def die(path, **kwargs):
            next(Path(path).rglob("a")).unlink()
            os.kill(os.getpid(), signal.SIGKILL)

        shutil.rmtree = die
        remove(tmp_path / "step-2")

    assert os.WTERMSIG(in_child(work)) == signal.SIGKILL
    assert all_checkpoints(tmp_path) == []
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_are_ordered_by_step_and_the_oldest_go(tmp_path):
    for step in (5, 100, 20):
        make(tmp_path, step)
    (tmp_path / "notes").mkdir()
    assert [step_of(path) for path in all_checkpoints(tmp_path)] == [5, 20, 100]
    prune(tmp_path, 2)
    assert [step_of(path) for path in all_checkpoints(tmp_path)] == [20, 100]
    assert (tmp_path / "notes").is_dir()


def test_sweeping_leaves_other_hidden_files_alone(tmp_path):
    (tmp_path / ".lock").touch()
    sweep(tmp_path)
    assert (tmp_path / ".lock").exists()


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("[enforce fail] file write failed")],
)
def test_whatever_a_writer_raises_becomes_an_error_of_the_disk_with_a_way_out(tmp_path, error):
    with (
        pytest.raises(OSError, match=r"cannot be written.*MiB free.*carries on") as caught,
        writing(tmp_path / "a"),
    ):
        raise error
    assert str(tmp_path / "a") in str(caught.value)
