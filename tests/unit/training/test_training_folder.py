"""Who may work in an output folder, and what is in it when a run is complete."""

import os
import signal

import pytest
import yaml

from hiplora.errors import ConfigError
from hiplora.training.recipe import TrainRecipe
from hiplora.training.run import RunFolder, assembled, check_claim, claimed, recipe_text
from tests.tiny import save_tiny

SOURCES = {"train": {"file": "rows.jsonl", "sha256": "abc", "rows": 3}}


def recipe(**train):
    return TrainRecipe.model_validate({"model": "some/model", "data": "rows.jsonl", "train": train})


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "out")


def begin(run, made=None, sources=SOURCES, overwrite=False):
    made = made or recipe()
    check_claim(run, made, resume=False, overwrite=overwrite)
    with claimed(run, made, sources, overwrite):
        pass


def finish(run):
    with assembled(run) as aside:
        for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
            (aside / name).write_text("{}")


def checkpoint(run, step=3):
    (run.checkpoints / f"step-{step}").mkdir()


def test_a_run_begins_with_its_recipe(run):
    begin(run, recipe(steps=7))
    stored = yaml.safe_load((run.path / "recipe.yaml").read_text())
    assert TrainRecipe.model_validate(stored) == recipe(steps=7)
    assert next(iter(stored["method"])) == "name"


def test_an_unfinished_run_of_the_same_recipe_may_go_on(run):
    begin(run)
    checkpoint(run)
    begin(run)
    assert run.last_checkpoint.name == "step-3"


def test_another_recipe_is_refused_and_the_difference_named(run):
    begin(run, recipe(lr=1e-3))
    with pytest.raises(
        ConfigError, match=r"an unfinished run of another recipe \(train\.lr: 0\.001 there, 0\.0002 here"
    ):
        begin(run)


def test_a_finished_run_is_left_alone_unless_it_may_be_overwritten(run):
    begin(run)
    finish(run)
    assert run.complete
    with pytest.raises(ConfigError, match="exists already"):
        check_claim(run, recipe(), resume=False, overwrite=False)
    check_claim(run, recipe(), resume=True, overwrite=False)
    with pytest.raises(ConfigError, match="a finished run of another recipe"):
        check_claim(run, recipe(steps=3), resume=True, overwrite=False)
    begin(run, overwrite=True)
    assert not run.complete


def test_a_folder_with_other_things_in_it_is_refused(run):
    run.path.mkdir()
    (run.path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="exists already"):
        begin(run)
    assert [path.name for path in run.path.iterdir()] == ["thesis.tex"]


def test_a_folder_that_a_run_made_and_never_used_may_be_used(run):
    run.checkpoints.mkdir(parents=True)
    (run.checkpoints / ".lock").touch()
    (run.path / ".recipe.yaml.x.part").touch()
    begin(run)


def test_changed_data_stop_a_run_from_going_on(run):
    begin(run)
    checkpoint(run)
    changed = {"train": {**SOURCES["train"], "sha256": "def"}}
    with pytest.raises(ConfigError, match="the data changed since this run began"):
        begin(run, sources=changed)
    begin(run, sources=changed, overwrite=True)


def test_two_processes_cannot_train_in_one_folder(run):
    made = recipe()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with claimed(run, made, SOURCES, False):
            os.write(write, b"x")
            signal.pause()
    os.read(read, 1)
    try:
        for overwrite in (False, True):
            with pytest.raises(ConfigError, match="another process is training there"):
                begin(run, overwrite=overwrite)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    begin(run)  # a killed process holds nothing


def test_the_file_without_which_nothing_loads_comes_last(run, monkeypatch):
    import pathlib

    begin(run)
    order, original = [], pathlib.Path.replace

    def replace(self, target):
        order.append(self.name)
        return original(self, target)

    monkeypatch.setattr(pathlib.Path, "replace", replace)
    finish(run)
    assert order[-1] == "adapter_config.json"
    assert len(order) == 3


def test_a_run_that_dies_while_it_is_assembled_is_not_complete(run):
    begin(run)
    with pytest.raises(KeyboardInterrupt), assembled(run) as aside:
        (aside / "adapter_config.json").write_text("{}")
        raise KeyboardInterrupt
    assert not run.complete
    finish(run)
    assert sorted(path.name for path in run.path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoints",
        "recipe.yaml",
    ]


def test_the_resolved_recipe_trains_as_it_is(tmp_path):
    from hiplora.training.recipe import load_recipe
    from tests.tiny import write_jsonl

    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}])
    made = TrainRecipe(model=str(save_tiny(tmp_path / "m")), data={"path": path}, method="pissa")
    (tmp_path / "recipe.yaml").write_text(recipe_text(made))
    assert load_recipe(tmp_path / "recipe.yaml") == made
