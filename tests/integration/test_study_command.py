"""`hiplora study` on a recipe of a few jobs: plan, run, status, report, and what goes wrong."""

import json

import pytest

from hiplora.recipes.protocols import Protocols
from tests.commands import run

pytestmark = pytest.mark.slow

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
ASKED = "single_task"
BAD = "domains.knowledge.train={path: alpaca.jsonl, format: messages, held_out_fraction: 0.1}"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "small.yaml"
    path.write_text(RECIPE + "".join(f"  {name}: null\n" for name in Protocols.model_fields if name != ASKED))
    return path


def test_plan_run_status_report(small, tmp_path, capsys):
    out = tmp_path / "study"
    code, told, _ = run(capsys, "study", "plan", small, "--out", out, "--no-measure", "--json")
    assert code == 0
    plan = json.loads(told)
    assert (plan["jobs"], plan["left"]) == (5, 5)
    code, told, err = run(capsys, "study", "run", small, "--out", out, "--verbose")
    assert code == 0
    assert "5 of 5 jobs are done" in told
    assert "5/5" in err
    code, told, _ = run(capsys, "study", "status", small, "--out", out, "--json")
    assert json.loads(told)["left"] == 0
    code, told, _ = run(capsys, "study", "report", small, "--out", out)
    assert code == 0
    assert (out / "report" / "report.html").is_file()
    assert (out / "report" / "tables" / "single-task-accuracy.md").is_file()
    code, told, err = run(capsys, "study", "run", small, "--out", out, "--verbose")
    assert (code, err) == (0, "")


def test_a_failed_job_is_named_with_its_reason_and_the_others_are_done(small, tmp_path, capsys):
    code, told, err = run(capsys, "study", "run", small, "--out", tmp_path / "study", "--set", BAD, "--json")
    found = json.loads(told)
    assert code == 1
    assert list(found["failed"]) == ["train LoRA on knowledge, seed 42"]
    assert "field `messages` is missing" in found["failed"]["train LoRA on knowledge, seed 42"]
    assert (found["left"], found["blocked"]) == (2, 1)
    code, told, err = run(capsys, "study", "status", small, "--out", tmp_path / "study", "--set", BAD)
    assert "failed: train LoRA on knowledge, seed 42" in err


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_method_that_does_not_fit_the_model_is_named_before_anything_runs(small, tmp_path, capsys, command):
    change = "methods.lora.method={name: lora, target_modules: [no_such_module]}"
    code, _, err = run(capsys, "study", command, small, "--out", tmp_path / "study", "--set", change)
    assert code == 2
    assert "method LoRA: target_modules ['no_such_module'] matches no linear layer" in err
    assert not (tmp_path / "study" / "results").exists()


def test_a_report_is_not_written_over_another_folder(small, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    code, _, err = run(
        capsys, "study", "report", small, "--out", tmp_path / "study", "--to", tmp_path / "there"
    )
    assert code == 2
    assert "exists" in err


def test_a_recipe_with_mistakes_names_them(tmp_path, capsys):
    path = tmp_path / "wrong.yaml"
    path.write_text("study: x\nmodel: pico\nsteps: 3\n")
    code, _, err = run(capsys, "study", "plan", path)
    assert code == 2
    assert "line 3: steps: unknown field" in err
    assert "domains: is missing" in err


def test_records_that_cannot_be_read_are_refused(small, tmp_path, capsys):
    records = tmp_path / "records.jsonl"
    records.write_text("nothing\n")
    code, _, err = run(capsys, "study", "run", small, "--out", tmp_path / "study", "--reuse", records)
    assert code == 2
    assert f"--reuse {records}: cannot be read" in err


@pytest.mark.parametrize("option", [("--address", "127.0.0.1:1"), ("--gpus-per-job", 1)])
def test_what_only_a_cluster_can_give_is_refused_without_one(small, tmp_path, capsys, option):
    code, _, err = run(capsys, "study", "run", small, "--out", tmp_path / "out", *option)
    assert code == 2
    assert "add --executor ray" in err


def test_a_cluster_that_is_not_there_is_told_at_once(small, tmp_path, capsys):
    options = ("--executor", "ray", "--address", "127.0.0.1:1")
    code, _, err = run(capsys, "study", "run", small, "--out", tmp_path / "out", *options)
    assert code == 2
    assert "no Ray cluster can be reached there" in err


def test_a_running_cluster_has_its_own_workers(small, tmp_path, capsys):
    options = ("--executor", "ray", "--address", "127.0.0.1:1", "--workers", 2)
    code, _, err = run(capsys, "study", "run", small, "--out", tmp_path / "out", *options)
    assert code == 2
    assert "leave out --workers, or --address" in err


def test_gpus_that_no_machine_has_are_told(small, tmp_path, capsys):
    options = ("--executor", "ray", "--gpus-per-job", 99)
    code, _, err = run(capsys, "study", "run", small, "--out", tmp_path / "out", *options)
    assert code == 2
    assert "no machine of the cluster has more than" in err
