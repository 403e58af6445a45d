"""Opening a study, what must be there before it runs, and how long the rest will take."""

import pytest

from hiplora.errors import ConfigError, DataError
from hiplora.study.pico import PICO_DATA
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


SPLIT = "{title: Split, method: {name: split_lora, clients: 3, cut_layer: 0}, train: {gradient_accumulation: 1}}"
RULES = "protocols.merge_fail={methods: [lora], rules: %s}"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (RULES % "{additon: {}}", r"merge_fail\.rules\.additon"),
        (RULES % "{ties: {density: 7}}", r"merge_fail\.rules\.ties"),
        (RULES % "{ties: {none: 1}}", r"merge_fail\.rules\.ties"),
        (f"methods.lora={SPLIT}", r"study pico: .*client"),
        ("domains.code.tasks={lm_evals_own: 2, gsm9k: 2}", r"unknown tasks: gsm9k; expected one of .*gsm8k"),
        ("domains.code.tasks={humaneval: 2}", "humaneval run code that the model writes; allow it with"),
    ],
)
def test_what_cannot_work_is_named_before_anything_runs(tmp_path, monkeypatch, change, said):
    monkeypatch.setattr("hiplora.evaluation.engine.foreign_tasks", lambda: frozenset({"lm_evals_own"}))
    with pytest.raises(ConfigError, match=said):
        check(opened(tmp_path, change))


def test_the_variable_names_the_data_of_models_that_bring_none(tmp_path, monkeypatch):
    monkeypatch.setenv("HIPLORA_DATA", str(tmp_path))
    assert opened(tmp_path).place.data == PICO_DATA
    assert opened(tmp_path, "model=owner/name").place.data == tmp_path


def test_missing_files_are_named_and_code_may_be_allowed(tmp_path):
    with pytest.raises(DataError, match=r"files of the study are missing in .*: .*gsm8k_train\.jsonl"):
        check(opened(tmp_path, data=tmp_path, allow_code=True))
    check(opened(tmp_path, "domains.code.tasks={humaneval: 2}", allow_code=True))
    check(opened(tmp_path))


def test_the_status_counts_kinds_and_names_failures_and_divergences(tmp_path):
    study = opened(tmp_path)
    bad, failed, other = [job for job in study.graph if job.kind == "train"][:3]
    object.__setattr__(other, "name", failed.name)
    for job, result in ((study.score(), {"tasks": {}}), (bad, {"diverged": "the loss is nan"})):
        study.store.finish(job, result, {"seconds": 1.0}, artifact=False)
    study.store.fail(failed, ValueError("no luck"))
    report = status(study)
    assert (report["jobs"], report["left"]) == (len(study.graph), len(study.graph) - 2)
    assert report["kinds"]["evaluate"]["left"] == report["kinds"]["evaluate"]["jobs"] - 1
    assert report["failed"] == {failed.name: "no luck"}
    assert report["diverged"] == {bad.name: "the loss is nan"}
    assert report["at_work"] == []


def test_time_is_estimated_from_the_jobs_of_a_kind_by_their_size(tmp_path):
    study = opened(tmp_path, "rates=null", "methods.lora.train={steps: 12}")
    report = status(study)
    assert (report["seconds_left"], sorted(report["without_estimate"])) == (None, ["evaluate", "train"])
    trainings = [job for job in study.graph if job.kind == "train"]
    short = next(job for job in trainings if job.settings["recipe"]["train"]["steps"] == 6)
    study.store.finish(short, {}, {"seconds": 3.0, "peak_memory_bytes": 7}, artifact=True)
    report = status(study)
    steps = sum(job.settings["recipe"]["train"]["steps"] for job in trainings if job != short)
    assert report["kinds"]["train"]["seconds"] == pytest.approx(0.5 * steps)
    assert report["without_estimate"] == ["evaluate"]
    assert report["peak_memory_bytes"] == 7


@pytest.mark.slow
def test_a_measurement_gives_the_time_of_a_step_and_of_an_item(tmp_path):
    study = opened(tmp_path, "rates=null")
    report = status(study, measure(study))
    assert report["seconds_left"] > 0
    assert report["without_estimate"] == []
    assert report["peak_memory_bytes"] > 2**20
