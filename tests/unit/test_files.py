import os
from pathlib import Path

import pytest

from hiplora import files
from hiplora.errors import ConfigError
from hiplora.run_folder import RunFolder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def out(tmp_path):
    """A folder of output that holds `old`, alone in its own folder."""
    (tmp_path / "here" / "out").mkdir(parents=True)
    (tmp_path / "here" / "out" / "old").write_text("old")
    return tmp_path / "here" / "out"


def test_the_cache_follows_its_environment_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("HIPLORA_CACHE", str(tmp_path / "c"))
    assert files.cache_dir() == tmp_path / "c"
    monkeypatch.delenv("HIPLORA_CACHE")
    assert files.cache_dir().name == "hiplora"


def test_a_file_is_written_with_its_parents_and_the_usual_permissions(tmp_path):
    path = files.write_atomic(tmp_path / "a" / "b.txt", "grüße\n")
    assert path.read_bytes() == "grüße\n".encode()
    assert path.stat().st_mode & 0o777 == files.file_mode()
    assert names(path.parent) == ["b.txt"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(out, monkeypatch, step):
    def fail(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomic(out / "old", "new")
    monkeypatch.undo()
    assert (out / "old").read_text() == "old"
    assert names(out) == ["old"]


def test_what_exists_is_replaced_only_if_that_is_said(out):
    assert files.check_output_dir(out.parent / "new") == out.parent / "new"
    assert files.check_output_file(out / "new.html") == out / "new.html"
    with pytest.raises(ConfigError, match=r"exists already; name another folder or pass --overwrite"):
        files.check_output_dir(out)
    with pytest.raises(ConfigError, match=r"--html .*exists already; name another file or pass --overwrite"):
        files.check_output_file(out / "old", option="--html")
    assert files.check_output_dir(out, overwrite=True) == out
    assert files.check_output_file(out / "old", overwrite=True) == out / "old"
    with pytest.raises(ConfigError, match="is a folder"):
        files.check_output_file(out, overwrite=True)
    with pytest.raises(ConfigError, match="is not a folder"):
        files.check_output_dir(out / "old", overwrite=True)


@pytest.mark.parametrize("precious", ["work", ".", "checkout", "home", "disk/home"])
def test_overwriting_never_deletes_where_the_user_works_or_lives(tmp_path, monkeypatch, precious):
    for folder in ("work/here", "checkout/.git", "disk/home"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "home").symlink_to("disk/home")
    monkeypatch.chdir(tmp_path / "work" / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = tmp_path / precious if precious != "." else "."
    with pytest.raises(ConfigError, match="would delete all of this folder"):
        files.check_output_dir(path, overwrite=True)


@pytest.mark.parametrize("out", ["in", ".", "in/part"])
def test_no_output_replaces_an_input_or_what_holds_it_or_a_part_of_it(tmp_path, out):
    (tmp_path / "in" / "part").mkdir(parents=True)
    inputs = {"the data": tmp_path / "in", "a model of the hub": "owner/name", "nothing": None}
    with pytest.raises(ConfigError, match="would delete the data"):
        files.check_output_dir(tmp_path / out, True, inputs)
    (tmp_path / "in" / "x.json").touch()
    with pytest.raises(ConfigError, match=r"--html .*would delete the data"):
        files.check_output_file(tmp_path / "in" / "x.json", True, "--html", inputs)
    assert files.check_output_file(tmp_path / "in" / "new.json", True, inputs=inputs)


def test_a_staged_folder_appears_whole_when_its_block_ends(tmp_path):
    final = tmp_path / "deep" / "out"
    with files.staged_dir(final) as aside:
        (aside / "x").write_text("1")
        assert not final.exists()
    assert (final / "x").read_text() == "1"
    assert names(final.parent) == ["out"]
    assert final.stat().st_mode & 0o777 == 0o777 & ~(0o666 ^ files.file_mode())
    with pytest.raises(ConfigError, match="--overwrite"), files.staged_dir(final):
        raise AssertionError("the block ran")


@pytest.mark.parametrize("when", ["in the block", "in the last step"])
def test_a_staged_folder_that_fails_leaves_the_old_one_and_nothing_else(out, monkeypatch, when):
    replace = os.replace

    def fail_for_the_new(source, target):
        if os.fspath(source).endswith(".part"):
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", fail_for_the_new)
    with pytest.raises((KeyboardInterrupt, OSError)), files.staged_dir(out, overwrite=True) as aside:
        (aside / "new").write_text("2")
        if when == "in the block":
            raise KeyboardInterrupt
    assert names(out) == ["old"]
    assert names(out.parent) == ["out"]


def test_a_folder_that_appears_meanwhile_is_not_overwritten(tmp_path):
    final = tmp_path / "out"
    with pytest.raises(ConfigError, match="exists already"), files.staged_dir(final) as aside:
        (aside / "mine").write_text("1")
        final.mkdir()
        (final / "theirs").write_text("2")
    assert names(final) == ["theirs"]
    assert names(tmp_path) == ["out"]


def test_what_killed_processes_left_is_swept_and_a_folder_they_moved_away_is_put_back(out):
    (out.parent / ".out.1.part").mkdir()
    (out.parent / ".out.2.old").mkdir()
    out.rename(out.parent / ".out.2.old" / "old")
    with pytest.raises(ConfigError, match="exists already"), files.staged_dir(out):
        pass
    assert names(out.parent) == ["out"]
    assert names(out) == ["old"]


def test_what_another_output_with_a_longer_name_is_writing_is_left_alone(tmp_path):
    with files.staged_dir(tmp_path / "model.v2") as other:
        (other / "mine").touch()
        with files.staged_dir(tmp_path / "model"):
            pass
    assert names(tmp_path) == ["model", "model.v2"]
    assert names(tmp_path / "model.v2") == ["mine"]


@pytest.mark.parametrize("exists", [False, True])
def test_a_staged_folder_is_written_where_a_link_leads(tmp_path, exists):
    (tmp_path / "link").symlink_to("real")
    if exists:
        (tmp_path / "real").mkdir()
    with files.staged_dir(tmp_path / "link", overwrite=True) as aside:
        (aside / "new").touch()
    assert names(tmp_path / "real") == ["new"]
    assert (tmp_path / "link").is_symlink()


def test_two_processes_do_not_write_one_folder(tmp_path):
    with files.staged_dir(tmp_path / "out"), pytest.raises(ConfigError, match="another process is working there"):
        files.staged_dir(tmp_path / "out").__enter__()
    assert names(tmp_path) == ["out"]


def test_a_lock_file_is_removed_while_it_is_held_so_that_nobody_elses_is(tmp_path, monkeypatch):
    release, present = files.FileLock.release, []

    def watched(lock, *arguments, **options):
        present.append(Path(lock.lock_file).exists())
        release(lock, *arguments, **options)

    monkeypatch.setattr(files.FileLock, "release", watched)
    with files.staged_dir(tmp_path / "staged"):
        pass
    run = RunFolder(tmp_path / "run", "plan.json", "done.json")
    with run.claimed({}):
        (run.path / "done.json").touch()
    assert present
    assert not any(present)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no folder in which nothing can be made")
def test_a_place_in_which_nothing_can_be_made_is_named_at_once_with_the_reason():
    with pytest.raises(OSError, match="No such file or directory"), files.staged_dir("/proc/out"):
        pass
    run = RunFolder(Path("/proc/out"), "recipe.yaml", "done.json")
    with pytest.raises(OSError, match="No such file or directory"), run.claimed({}):
        pass


def test_yaml_is_plain_values_with_the_exponents_of_yaml_1_2():
    assert files.parse_yaml("lr: 1e-3\nnames: [a, 2, no]") == {"lr": 1e-3, "names": ["a", 2, False]}


GROWS = ["&a [*a]", "base: &b {k: 1}\nmore: {<<: *b}", "[" * 3000]
BROKEN = ["0x_", "2001-13-45", "!!int x", "{? [1, 2] : 3}", "a: {k: 1, k: 2}", "a\0b"]


@pytest.mark.parametrize("text", [*GROWS, *BROKEN, "!!python/object/apply:os.getcwd []"])
def test_yaml_that_grows_or_runs_or_cannot_be_built_is_refused(text):
    with pytest.raises(ValueError, match=r"\w"):
        files.parse_yaml(text)
