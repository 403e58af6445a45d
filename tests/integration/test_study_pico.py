"""The study of every protocol on the smallest model: undisturbed, and killed at random moments, with equal results."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

from hiplora.recipes.load_study import load_study
from hiplora.study.engine.store import Store
from hiplora.study.running import open_study
from tests.commands import run

pytestmark = pytest.mark.slow

CODE = "--allow-code-execution"
KILLS = 4
# The study that is killed asks for one protocol of each kind of job, mostly with one method; what it finds is part of
# what the whole one found.
LEFT_OUT = ("adalora", "merge_fail", "lambda_curve", "ablations", "selection", "frontier", "claims")
ONE_METHOD = ("merging", "allocation", "continual", "editing", "cost")
PART = [
    *(f"--set=protocols.{name}=null" for name in LEFT_OUT),
    *(f"--set=protocols.{name}.methods=[hiplora]" for name in ONE_METHOD),
    "--set=protocols.single_task.methods=[split-lora, hiplora]",
    "--set=protocols.merging.rules={addition: {}}",
]
KINDS = {"train", "evaluate", "merge", "collect", "factorize", "inspect", "edit", "probe", "speed"}


def command(folder, *more):
    return [
        sys.executable,
        "-m",
        "hiplora",
        "study",
        "run",
        "pico",
        "--out",
        str(folder),
        "--workers",
        "2",
        *more,
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The whole study, run once; test processes that run beside each other share it, as runs of a study do."""
    shared = tmp_path_factory.getbasetemp()
    folder = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "pico-undisturbed"
    began = time.monotonic()
    done = subprocess.run(command(folder, CODE, "--json"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout), time.monotonic() - began


def found(folder):
    """The results of the part's jobs, by name and key."""
    changes = [change.removeprefix("--set=") for change in PART]
    opened = open_study(load_study("pico", changes), folder, None)
    assert {job.kind for job in opened.graph} == KINDS
    store = Store(folder)
    results = {f"{job.name} {job.key}": store.result(job) for job in opened.graph}
    assert None not in results.values()
    return results


def test_the_whole_study_is_done(undisturbed):
    _, told, _ = undisturbed
    assert (told["left"], told["failed"], told["missing_files"]) == (0, {}, [])
    assert set(told["kinds"]) == KINDS


def test_every_section_of_the_report_is_whole(undisturbed, capsys):
    folder, _, _ = undisturbed
    code, out, err = run(capsys, "study", "report", "pico", "--out", folder, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    asked = [name for name, settings in load_study("pico").protocols if settings is not None]
    shown = [name.replace("-", "_") for name in report["sections"]]
    assert shown == ["claims", *(name for name in asked if name != "claims")]  # the verdicts first
    assert set(report["sections"].values()) == {0}
    assert report["left"] == 0
    assert report["measurements"] > 100
    rows = (folder / "report" / "measurements.csv").read_text().splitlines()
    assert len(rows) > 100
    for table in (folder / "report" / "tables").glob("*.md"):
        assert "nan" not in table.read_text().lower()


def test_the_study_goes_on_elsewhere_from_its_records(undisturbed, tmp_path, capsys):
    folder, _, _ = undisturbed
    run(capsys, "study", "report", "pico", "--out", folder, "--to", tmp_path / "report")
    records = tmp_path / "report" / "records.jsonl.gz"
    code, out, _ = run(
        capsys, "study", "run", "pico", "--out", tmp_path / "new", "--reuse", records, CODE, "--json"
    )
    told = json.loads(out)
    assert (code, told["left"]) == (0, 0)
    assert told["taken"] == told["jobs"]
    assert not (tmp_path / "new" / "artifacts").exists()


def test_killed_at_random_moments_it_ends_with_the_same_results(undisturbed, tmp_path):
    folder, _, took = undisturbed
    chance = random.Random(os.urandom(4))
    for _ in range(KILLS):
        with subprocess.Popen(
            command(tmp_path / "killed", CODE, *PART), stderr=subprocess.DEVNULL
        ) as process:
            try:
                process.wait(timeout=chance.uniform(3, 3 + max(took / 2, 60) / KILLS))
                break
            except subprocess.TimeoutExpired:
                family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                chance.choice(family).send_signal(signal.SIGKILL)
                time.sleep(chance.uniform(0, 1))
                process.kill()
    done = subprocess.run(command(tmp_path / "killed", CODE, *PART), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert found(tmp_path / "killed") == found(folder)
    assert not any((tmp_path / "killed" / "work").glob("*"))
