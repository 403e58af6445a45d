"""Opening a study, what must be there before it runs, and how long the rest will take."""

import pytest

from hiplora.errors import ConfigError, DataError
from hiplora.recipes.load_study import load_study
from hiplora.study.estimate import gpu
from hiplora.study.plan import job_costs
from hiplora.study.running import Executor, Progress, check, open_study, run, status, work_of
from tests.unit.study.protocols.made import finish

TWO = "protocols={single_task: {methods: [lora, lora-mlp]}}"


def opened(folder, *changes, data=None, allow_code=False):
    return open_study(load_study("pico", (TWO, *changes)), folder / "study", data, allow_code)


def test_the_smallest_study_brings_its_data(tmp_path):
    found = opened(tmp_path, allow_code=True)
    assert (tmp_path / "study" / "data" / "gsm8k_train.jsonl").is_file()
    check(found)


def test_a_data_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such folder"):
        opened(tmp_path, data=tmp_path / "nowhere")


def test_missing_files_are_named_before_anything_runs(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"files of the study are missing in .*empty: .*gsm8k_train\.jsonl"):
        check(opened(tmp_path, data=tmp_path / "empty", allow_code=True))


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ("{additon: {}}", r"merge_fail\.rules\.additon: .*additon"),
        ("{ties: {density: 7}}", r"merge_fail\.rules\.ties: .*density"),
        ("{ties: {none: 1}}", r"merge_fail\.rules\.ties: .*no option 'none'"),
    ],
)
def test_a_merge_rule_that_is_none_is_named_before_anything_runs(tmp_path, rules, told):
    with pytest.raises(ConfigError, match=told):
        opened(tmp_path, f"protocols.merge_fail={{methods: [lora], rules: {rules}}}")


def test_settings_that_do_not_fit_each_other_are_a_mistake_and_no_defect(tmp_path):
    with pytest.raises(ConfigError, match=r"a job of it cannot be: .*client"):
        opened(
            tmp_path,
            "methods.lora={title: Split, method: {name: split_lora, clients: 3, cut_layer: 0}}",
            "train.gradient_accumulation=1",
        )


def test_a_file_is_no_folder_for_results(tmp_path):
    (tmp_path / "study").write_text("")
    with pytest.raises(ConfigError, match="study: is a file"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("protocol", "told"),
    [
        (
            "editing: {methods: [lora], alphaedit: {steps: 3}}",
            r"edit .* by AlphaEdit.*: alphaedit has no setting 'steps'",
        ),
        (
            "editing: {methods: [lora], alphaedit: {layers: [0, 7]}}",
            r"edit .* by AlphaEdit.*: layers is \[0, 7\].*2 blocks",
        ),
        (
            "editing: {methods: [lora], alphaedit: {layers: 1}}",
            r"edit .* by AlphaEdit.*: layers is 1; expected a list",
        ),
        (
            "rank_one: {modules: [nope]}",
            r"probe the base, weight basis: .*\['nope'\] matches no linear layer",
        ),
        (
            "single_task: {methods: [split]}",
            r"train Split on .*: method\.cut_layer 3: the model has only 2 layers",
        ),
    ],
)
def test_a_job_that_does_not_fit_the_model_is_named_before_anything_runs(tmp_path, protocol, told):
    split = "methods.split={title: Split, method: {name: split_lora, clients: 1, cut_layer: 3}}"
    found = open_study(load_study("pico", (f"protocols={{{protocol}}}", split)), tmp_path, None, True)
    with pytest.raises(ConfigError, match=told):
        run(found, Executor())
    with pytest.raises(ConfigError, match=told):
        job_costs(found.graph, "pico", gpu("H100"))
    assert not (tmp_path / "results").exists()


def test_a_task_that_nobody_knows_is_named_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("hiplora.evaluation.engine.foreign_tasks", lambda: frozenset({"lm_evals_own"}))
    found = opened(tmp_path, "domains.code.tasks={lm_evals_own: 2, gsm9k: 2}", allow_code=True)
    with pytest.raises(ConfigError, match=r"nobody knows: gsm9k; expected one of .*gsm8k"):
        check(found)


def test_running_code_needs_leave(tmp_path):
    with pytest.raises(ConfigError, match="humaneval run code that the model writes; allow it with"):
        check(opened(tmp_path, "domains.code.tasks={humaneval: 2}"))
    check(opened(tmp_path))


def test_time_is_foreseen_from_what_jobs_of_a_kind_took(tmp_path):
    found = opened(tmp_path, "rates=null")
    trainings = [job for job in found.graph if job.kind == "train"]
    progress = Progress(found, Executor(workers=2))
    assert progress.total == len(found.graph)
    assert progress.seconds_left() is None
    progress.hear({"event": "begin", "key": trainings[0].key})
    assert progress.done == 0
    progress.hear({"event": "end", "key": trainings[0].key, "seconds": 10.0})
    by_trainings = progress.seconds_left()
    assert (
        by_trainings > 10.0 * (len(trainings) - 1) / 2
    )  # two workers; evaluations count too before the first is done
    progress.hear({"event": "end", "key": found.study.score().key, "seconds": 1e6})
    assert progress.seconds_left() > 2 * by_trainings
    assert (progress.done, progress.failed) == (2, 0)
    whole = progress.seconds_left()
    progress.hear({"event": "end", "key": trainings[1].key, "seconds": 10.0})
    assert progress.seconds_left() < whole
    progress.hear({"event": "failed", "key": trainings[2].key})
    assert progress.failed == 1


def test_what_took_time_before_counts_too(tmp_path):
    found = opened(tmp_path, "rates=null")
    finish(found.store, found.study.score(), {}, seconds=3.0)
    for job in found.graph:
        if job.kind == "train":
            finish(found.store, job, {}, seconds=5.0)
    progress = Progress(found, Executor())
    # trainings are done again for their adapters, which the evaluations read
    assert progress.total == len(found.graph) - 1
    assert progress.seconds_left() > 5.0 * 15


def test_the_status_counts_kinds_and_names_failures(tmp_path):
    found = opened(tmp_path)
    base = found.study.score()
    finish(found.store, base, {})
    job = next(job for job in found.graph if job.kind == "train")
    found.store.fail(job, ValueError("no luck"), "run")
    told = status(found)
    assert told["jobs"] == len(found.graph)
    assert told["left"] == len(found.graph) - 1
    assert told["kinds"]["evaluate"]["left"] == told["kinds"]["evaluate"]["jobs"] - 1
    assert told["failed"] == {job.name: "no luck"}
    assert told["at_work"] == []


def test_trainings_that_diverged_count_as_done_and_are_named(tmp_path):
    found = open_study(load_study("pico", ("protocols={single_task: {methods: [lora]}}",)), tmp_path, None)
    job = next(job for job in found.graph if job.kind == "train")
    finish(found.store, job, {"diverged": f"{job.name}: the loss is nan at step 2"})
    told = status(found)
    assert told["left"] == len(found.graph) - 1
    assert told["diverged"] == {job.name: f"{job.name}: the loss is nan at step 2"}


def test_decompositions_are_work_and_more_so_with_a_basis_that_is_measured(tmp_path):
    methods = "protocols={single_task: {methods: [hiplora, hiplora-activation]}}"
    found = open_study(load_study("pico", (methods, "rates=null")), tmp_path, None)
    works = work_of(found.graph, found.study.recipe.model, found.place.data)
    weight, measured = (
        next(works[job.key] for job in found.graph if job.name == f"factors of {title}")
        for title in ("HiP-LoRA", "HiP-LoRA (activation)")
    )
    assert 2 < weight < measured / 2
