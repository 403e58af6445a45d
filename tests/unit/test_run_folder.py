"""A run folder is new, its own, or refused; finished stages are not repeated."""

import shutil

import pytest

from hiplora import run_folder
from hiplora.errors import ConfigError
from hiplora.files import file_mode, write_atomic
from hiplora.run_folder import RunFolder

SETTINGS = {"steps": 3, "train": {"lr": 0.1}}


@pytest.fixture(params=["plan.json", "recipe.yaml"])
def run(request, tmp_path):
    return RunFolder(tmp_path / "out", request.param, "results.json")


def test_a_run_is_carried_on_by_its_own_settings_and_once_finished_only_to_resume(run):
    run.check(SETTINGS)
    with run.claimed(SETTINGS):
        run.stage("one", lambda: {"value": 1})
    run.check(SETTINGS)
    with pytest.raises(ConfigError, match=r"unfinished run with other settings \(train\.lr: 0\.1 there, 0\.2 here\)"):
        run.check({"steps": 3, "train": {"lr": 0.2}})
    run.check({"steps": 4}, overwrite=True)
    with run.claimed(SETTINGS):
        assert run.stored() == SETTINGS
        (run.path / "results.json").write_text("{}")
        (run.path / "weights").touch(mode=0o600)
    assert not (run.path / ".lock").exists()
    assert (run.path / "weights").stat().st_mode & 0o777 == file_mode()
    run.check(SETTINGS, resume=True)
    with pytest.raises(ConfigError, match="exists already"):
        run.check(SETTINGS)
    with pytest.raises(ConfigError, match="a finished run with other settings"):
        run.check({"steps": 4}, resume=True)
    with run.claimed(SETTINGS, overwrite=True):
        assert not (run.path / "stages").exists()


def test_a_folder_of_something_else_is_refused(run):
    run.path.mkdir()
    run.check(SETTINGS)
    for name in (run.settings, "thesis.tex", "checkpoints/mine.pt", "stages/one.json"):
        write_atomic(run.path / name, "{ not [ readable")
        with pytest.raises(ConfigError, match="exists already"):
            run.check(SETTINGS)
        shutil.rmtree(run.path)


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_processes_do_not_work_in_one_folder(run, overwrite):
    with run.claimed(SETTINGS), pytest.raises(ConfigError, match="another process is working there"):
        run.claimed(SETTINGS, overwrite=overwrite).__enter__()
    assert [path.name for path in run.path.parent.iterdir()] == [run.path.name]
    with run.claimed(SETTINGS):
        pass


def test_a_finished_stage_is_not_repeated_and_a_run_without_one_leaves_no_folder(run):
    calls = []
    with pytest.raises(ZeroDivisionError), run.claimed(SETTINGS):
        run.stage("one", lambda: {"value": 1 / 0})
    assert not run.path.exists()
    with pytest.raises(ZeroDivisionError), run.claimed(SETTINGS):
        for _ in range(2):
            assert run.stage("one", lambda: calls.append(1) or {"value": 1}) == {"value": 1}
        run.stage("two", lambda: {"value": 1 / 0})
    assert calls == [1]
    assert [path.name for path in (run.path / "stages").iterdir()] == ["one.json"]


@pytest.mark.parametrize(
    "text", ["[", "", "null", "[]", "{}", '{"value": {"n": 2}}', '{"sha256": 3, "value": {}}', "[" * 9999]
)
def test_a_damaged_stage_is_not_there(run, text):
    with pytest.raises(ZeroDivisionError), run.claimed(SETTINGS):
        run.stage("one", lambda: {"n": 1})
        (run.path / "stages" / "one.json").write_text(text)
        assert [run.stage("one", lambda n=n: {"n": n}) for n in (3, 4)] == [{"n": 3}] * 2
        run.stage("two", lambda: {"n": 1 / 0})


def test_a_start_that_fails_leaves_the_finished_run_that_it_was_to_replace(run):
    with run.claimed({"steps": 1}):
        (run.path / "results.json").write_text("finished")
    with pytest.raises(ConfigError), run.claimed(SETTINGS, overwrite=True):
        assert not (run.path / "results.json").exists()
        raise ConfigError("module foo is not in the model")
    assert (run.path / "results.json").read_text() == "finished"
    assert run.stored() == {"steps": 1}
    assert [path.name for path in run.path.parent.iterdir()] == [run.path.name]


def test_the_run_that_a_killed_process_was_replacing_stays_until_another_is_complete(run, monkeypatch):
    with run.claimed({"steps": 1}):
        (run.path / "results.json").write_text("finished")
    with monkeypatch.context() as patched:
        patched.setattr(run_folder, "sweep", lambda final: None)
        for _ in range(2):  # killed twice; the second replaces what the first began
            with pytest.raises(KeyboardInterrupt), run.claimed(SETTINGS, overwrite=True):
                (run.path / "stages").mkdir()
                raise KeyboardInterrupt
    shutil.rmtree(run.path)
    with pytest.raises(ConfigError, match="exists already"):
        run.check(SETTINGS)
    assert (run.path / "results.json").read_text() == "finished"
    with run.claimed(SETTINGS, overwrite=True):
        (run.path / "results.json").write_text("new")
    assert (run.path / "results.json").read_text() == "new"
    assert [path.name for path in run.path.parent.iterdir()] == [run.path.name]


def test_a_run_behind_a_link_is_replaced_where_it_is(run, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").write_text("old")
    run.path.symlink_to("real")
    with pytest.raises(ConfigError), run.claimed(SETTINGS, overwrite=True):
        raise ConfigError("module foo is not in the model")
    assert (run.path / "old").read_text() == "old"
    with run.claimed(SETTINGS, overwrite=True):
        (run.path / "results.json").write_text("new")
    assert (tmp_path / "real" / "results.json").read_text() == "new"
