import json
import os

import pytest

from hiplora.errors import ConfigError
from hiplora.provenance import folder_identity
from hiplora.study.folder import StudyFolder, check_claim, claimed, differences

PLAN = {"kind": "compare", "settings": {"steps": 5, "lr": 1e-3}}


def interrupted(out, plan=PLAN):
    with pytest.raises(RuntimeError), claimed(out, plan, False) as folder:
        folder.run("first", lambda: {"value": 1})
        folder.run("second", _fail)


def _fail():
    raise RuntimeError("killed")


def test_a_finished_stage_is_not_done_again_and_an_unfinished_one_is(tmp_path):
    interrupted(tmp_path / "out")
    with claimed(tmp_path / "out", PLAN, False) as folder:
        assert folder.has("first")
        assert not folder.has("first", "second")
        assert folder.run("first", _fail) == {"value": 1}
        assert folder.run("second", lambda: {"value": 2}) == {"value": 2}
        assert folder.read("second") == {"value": 2}
        assert list(folder.seconds()) == ["first", "second"]


def test_a_stage_is_whole_or_absent(tmp_path, monkeypatch):
    monkeypatch.setattr(
        os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space"):
        StudyFolder(tmp_path).run("first", lambda: {"value": 1})
    assert StudyFolder(tmp_path).read("first") is None
    assert not list((tmp_path / "stages").iterdir())


def test_an_unfinished_study_of_other_settings_is_refused_by_name(tmp_path):
    interrupted(tmp_path / "out")
    other = {"kind": "compare", "settings": {"steps": 6, "lr": 1e-3}}
    with pytest.raises(ConfigError, match=r"settings\.steps: 5 there, 6 here.*--overwrite"):
        check_claim(tmp_path / "out", other, False)
    with claimed(tmp_path / "out", other, True) as folder:
        assert not folder.has("first")
    assert json.loads((tmp_path / "out" / "plan.json").read_text()) == other


def test_a_finished_study_needs_overwrite(tmp_path):
    interrupted(tmp_path / "out")
    (tmp_path / "out" / "results.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"finished study.*--overwrite"):
        check_claim(tmp_path / "out", PLAN, False)
    check_claim(tmp_path / "out", PLAN, True)


def test_a_folder_of_something_else_is_refused_and_an_empty_one_is_taken(tmp_path):
    (tmp_path / "mine").mkdir()
    check_claim(tmp_path / "mine", PLAN, False)
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="exists already"):
        check_claim(tmp_path / "mine", PLAN, False)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="not a folder"):
        check_claim(tmp_path / "file", PLAN, True)


def test_checking_writes_nothing(tmp_path):
    check_claim(tmp_path / "out", PLAN, False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_processes_do_not_work_in_one_folder(tmp_path, overwrite):
    busy = pytest.raises(ConfigError, match="another process is working there")
    with claimed(tmp_path / "out", PLAN, False), busy, claimed(tmp_path / "out", PLAN, overwrite):
        pass
    assert (tmp_path / "out" / "plan.json").is_file()


def test_differences_name_the_path_of_a_setting():
    assert differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "d": 2}) == [
        "a.b: 1 there, 3 here",
        "c: 2 there, None here",
        "d: None there, 2 here",
    ]


def test_a_models_identity_changes_with_its_files_and_a_name_has_none(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = folder_identity(str(tmp_path))
    assert before == folder_identity(str(tmp_path))
    (tmp_path / "config.json").write_text("{ }")
    assert folder_identity(str(tmp_path)) != before
    assert folder_identity("owner/name") is None
