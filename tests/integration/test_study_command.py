"""`hiplora study` on a recipe of a few jobs: plan, run, status, report, and what is refused."""

import json
import shutil

import pytest

from hiplora.evaluation.sandbox import require_permission
from hiplora.files import write_atomic
from hiplora.study.pico import PICO_DATA
from hiplora.study.recipe import load_study
from tests.commands import run

RECIPE = """\
extends: pico
study: small
seeds: [42]
rates: null
domains:
  science: null
  code: null
protocols:
  single_task: {methods: [lora]}
"""
BAD = "domains.knowledge.train={path: alpaca.jsonl, format: messages, held_out_fraction: 0.1}"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "small.yaml"
    others = [name for name, settings in load_study("pico").protocols if settings and name != "single_task"]
    path.write_text(RECIPE + "".join(f"  {name}: null\n" for name in others))
    return path


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "report: exists already"),
        (("--to", "ours"), "--to ours: exists already"),
        (("--out", "of-ours"), "none of its 5 jobs is done"),
        (("--to", "artifacts", "--overwrite"), "would delete the study's artifacts"),
        (("--to", "data", "--overwrite"), "would delete the study's data"),
        (("--to", "data/ours", "--overwrite"), "none of its 5 jobs is done"),
        (("--set", "model=./base", "--to", "base", "--overwrite"), "would delete the base model"),
    ],
)
def test_a_report_replaces_a_report_and_no_other_folder_unasked(small, tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(PICO_DATA, "data")
    records = ("ours/records.jsonl.gz", "of-ours/report/records.jsonl.gz")
    for file in ("report/mine", "data/ours/x", "artifacts/key", "base/x", *records):
        write_atomic(file, "")
    before = sorted(tmp_path.rglob("*"))
    code, _, err = run(capsys, "study", "report", small, "--out", ".", "--data", "data", *options)
    assert (code, said in err) == (2, True), err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("options", [(), ("--allow-code-execution",)])
def test_a_plan_may_measure_tasks_that_run_code_where_that_is_allowed(small, tmp_path, monkeypatch, capsys, options):
    def measured(study):
        require_permission(study.place.allow_code)
        return {}

    monkeypatch.setattr("hiplora.study.plan.measure", measured)
    code, _, err = run(capsys, "study", "plan", small, "--out", tmp_path / "study", "--measure", *options)
    assert (code, "pass --allow-code-execution" in err) == ((0, False) if options else (2, True)), err


@pytest.mark.slow
def test_a_failed_job_is_named_with_its_reason_and_the_others_are_done(small, tmp_path, capsys):
    out = tmp_path / "study"
    code, said, _ = run(capsys, "study", "run", small, "--out", out, "--set", BAD, "--json")
    record = json.loads(said)
    assert code == 1
    assert list(record["failed"]) == ["train LoRA on knowledge, seed 42"]
    assert "messages" in record["failed"]["train LoRA on knowledge, seed 42"]
    assert record["left"] == 2
    _, _, err = run(capsys, "study", "status", small, "--out", out, "--set", BAD)
    assert "failed: train LoRA on knowledge, seed 42" in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--address", "127.0.0.1:1"), "no Ray cluster answers"),
        (("--gpus-per-job", 99), "no machine of the cluster has more than"),
    ],
)
def test_a_cluster_that_cannot_do_the_jobs_is_reported_at_once(small, tmp_path, capsys, options, said):
    pytest.importorskip("ray")
    code, _, err = run(capsys, "study", "run", small, "--out", tmp_path / "out", "--executor", "ray", *options)
    assert (code, said in err) == (2, True)
