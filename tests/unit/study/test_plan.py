"""Opening a study, what must be there before it runs, and how long the rest will take."""

import pytest

from hiplora.errors import ConfigError, DataError
from hiplora.study.plan import check, measure, open_study, status
from hiplora.study.recipe import load_study

TWO = "protocols={single_task: {methods: [lora, lora-mlp]}}"


def opened(folder, *changes, data=None, allow_code=False):
    return open_study(load_study("pico", (TWO, *changes)), folder / "study", data, allow_code)


def test_a_missing_folder_or_a_file_for_one_is_refused(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such folder"):
        opened(tmp_path, data=tmp_path / "nowhere")
    (tmp_path / "study").write_text("")
    with pytest.raises(ConfigError, match="study: is a file"):
        opened(tmp_path)


def test_missing_files_are_named_before_anything_runs(tmp_path):
    with pytest.raises(DataError, match=r"files of the study are missing in .*: .*gsm8k_train\.jsonl"):
        check(opened(tmp_path, data=tmp_path, allow_code=True))


@pytest.mark.parametrize("rules", ["{additon: {}}", "{ties: {density: 7}}", "{ties: {none: 1}}"])
def test_a_wrong_merge_rule_is_named_before_anything_runs(tmp_path, rules):
    with pytest.raises(ConfigError, match=rf"merge_fail\.rules\.{rules[1:4]}"):
        opened(tmp_path, f"protocols.merge_fail={{methods: [lora], rules: {rules}}}")


def test_settings_that_do_not_fit_each_other_are_refused(tmp_path):
    split = "methods.lora={title: Split, method: {name: split_lora, clients: 3, cut_layer: 0}}"
    with pytest.raises(ConfigError, match=r"study pico: .*client"):
        opened(tmp_path, split, "train.gradient_accumulation=1")


def test_an_unknown_task_is_named_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("hiplora.evaluation.engine.foreign_tasks", lambda: frozenset({"lm_evals_own"}))
    found = opened(tmp_path, "domains.code.tasks={lm_evals_own: 2, gsm9k: 2}", allow_code=True)
    with pytest.raises(ConfigError, match=r"unknown tasks: gsm9k; expected one of .*gsm8k"):
        check(found)


def test_running_code_needs_permission(tmp_path):
    with pytest.raises(ConfigError, match="humaneval run code that the model writes; allow it with"):
        check(opened(tmp_path, "domains.code.tasks={humaneval: 2}"))
    check(opened(tmp_path, "domains.code.tasks={humaneval: 2}", allow_code=True))
    check(opened(tmp_path))


def test_the_status_counts_kinds_and_names_failures_and_divergences(tmp_path):
    found = opened(tmp_path)
    bad, failed = [job for job in found.graph if job.kind == "train"][:2]
    for job, result in ((found.score(), {"tasks": {}}), (bad, {"diverged": "the loss is nan"})):
        found.store.finish(job, result, {"seconds": 1.0}, artifact=False)
    found.store.fail(failed, ValueError("no luck"))
    told = status(found)
    assert (told["jobs"], told["left"]) == (len(found.graph), len(found.graph) - 2)
    assert told["kinds"]["evaluate"]["left"] == told["kinds"]["evaluate"]["jobs"] - 1
    assert told["failed"] == {failed.name: "no luck"}
    assert told["diverged"] == {bad.name: "the loss is nan"}
    assert told["at_work"] == []


def test_time_is_estimated_from_the_jobs_of_a_kind_by_their_size(tmp_path):
    found = opened(tmp_path, "rates=null", "methods.lora.train={steps: 12}")
    told = status(found)
    assert (told["seconds_left"], sorted(told["without_estimate"])) == (None, ["evaluate", "train"])
    trainings = [job for job in found.graph if job.kind == "train"]
    short = next(job for job in trainings if job.settings["recipe"]["train"]["steps"] == 6)
    found.store.finish(short, {}, {"seconds": 3.0, "peak_memory_bytes": 7}, artifact=True)
    told = status(found)
    steps = sum(job.settings["recipe"]["train"]["steps"] for job in trainings if job != short)
    assert told["kinds"]["train"]["seconds"] == pytest.approx(0.5 * steps)
    assert told["without_estimate"] == ["evaluate"]
    assert told["peak_memory_bytes"] == 7


@pytest.mark.slow
def test_a_measurement_gives_the_time_of_a_step_and_of_an_item(tmp_path):
    found = opened(tmp_path, "rates=null")
    told = status(found, measure(found))
    assert told["seconds_left"] > 0
    assert told["without_estimate"] == []
    assert told["peak_memory_bytes"] > 2**20
