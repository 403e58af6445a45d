import json
import os
import shutil
import subprocess

import pytest

from hiplora import __version__
from hiplora import provenance as module
from hiplora.provenance import folder_identity, provenance


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The folder of a copy of hiplora, which is no repository yet."""
    folder = tmp_path / "repo" / "src" / "hiplora"
    folder.mkdir(parents=True)
    monkeypatch.setattr(module, "__file__", str(folder / "provenance.py"))
    module._commit.cache_clear()
    yield folder
    module._commit.cache_clear()


def test_it_names_versions_and_machine_and_what_the_caller_adds_but_nothing_of_the_user():
    record = provenance(seed=3)
    assert record["libraries"]["hiplora"] == __version__
    assert (record["machine"]["cores"], record["seed"]) == (os.cpu_count(), 3)
    assert set(record) == {"time", "commit", "libraries", "python", "machine", "seed"}
    assert set(record["machine"]) == {"system", "processor", "cores"}
    json.dumps(record)


def test_it_names_the_commit_and_says_when_files_differ_from_it(package):
    def git(*words):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *words]
        return subprocess.run(command, cwd=package.parents[1], check=True, capture_output=True, text=True).stdout

    assert provenance()["commit"] is None  # an installed package
    (package / "provenance.py").write_text("x = 1\n")
    for words in (("init", "-q"), ("add", "."), ("commit", "-qm", "first"), ("tag", "-a", "v1", "-m", "v1")):
        git(*words)
    head = git("rev-parse", "HEAD").strip()
    for text, commit in (("x = 1\n", head), ("x = 2\n", f"{head}-dirty")):
        (package / "provenance.py").write_text(text)
        module._commit.cache_clear()
        assert provenance()["commit"] == commit


def test_a_copy_of_a_folder_is_the_same_and_a_changed_byte_is_not(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "config.json").write_text("{}")
    (tmp_path / "one" / "weights").write_bytes(bytes(1 << 20) * 70)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    os.utime(tmp_path / "two" / "config.json", (0, 0))
    assert folder_identity(tmp_path / "one") == folder_identity(tmp_path / "two")
    with open(tmp_path / "two" / "weights", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    assert folder_identity(tmp_path / "one") != folder_identity(tmp_path / "two")
    assert folder_identity("org/name") is None
