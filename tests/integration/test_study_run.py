"""Studies on the smallest model: every protocol, killed at random moments, by several runs at once, and by Ray."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

from hiplora.study.plan import open_study
from hiplora.study.recipe import load_study
from hiplora.study.store import Store
from tests.commands import run

pytestmark = pytest.mark.slow

CODE = "--allow-code-execution"
KILLS = 3
KINDS = {"train", "evaluate", "merge", "collect", "factorize", "inspect", "edit", "probe", "speed"}
# One protocol of each kind of job, mostly with one method; its results are part of the whole study's.
LEFT_OUT = ("adalora", "merge_fail", "lambda_curve", "ablations", "selection", "frontier", "aims", "claims")
ONE_METHOD = ("merging", "allocation", "continual", "editing", "cost")
PART = [
    *(f"--set=protocols.{name}=null" for name in LEFT_OUT),
    *(f"--set=protocols.{name}.methods=[hiplora]" for name in ONE_METHOD),
    "--set=protocols.single_task.methods=[split-lora, hiplora]",
    "--set=protocols.merging.rules={addition: {}}",
]
FEW = [*PART, *(f"--set=protocols.{name}=null" for name in (*ONE_METHOD[1:], "rank_one")), "--set=rates=null"]


def command(folder, *more):
    words = ("study", "run", "pico", "--out", str(folder), "--workers", "2", CODE, *more)
    return [sys.executable, "-m", "hiplora", *words]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The whole study, run once; test processes that run beside each other share it, as runs of a study do."""
    shared = tmp_path_factory.getbasetemp()
    folder = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "pico-undisturbed"
    began = time.monotonic()
    done = subprocess.run(command(folder, "--json"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout), time.monotonic() - began


def results(folder, changes):
    opened = open_study(
        load_study("pico", [change.removeprefix("--set=") for change in changes]), folder, None
    )
    store = Store(folder)
    found = {f"{job.name} {job.key}": store.result(job) for job in opened.graph}
    assert None not in found.values()
    return found


def test_the_whole_study_is_done(undisturbed):
    _, told, _ = undisturbed
    assert (told["left"], told["failed"], told["missing_files"]) == (0, {}, [])
    assert set(told["kinds"]) == KINDS


def test_every_section_of_the_report_is_complete(undisturbed, capsys):
    folder, _, _ = undisturbed
    code, out, _ = run(capsys, "study", "report", "pico", "--out", folder, "--json")
    assert code == 0
    report = json.loads(out)
    assert set(report["sections"].values()) == {0}
    assert (report["left"], report["measurements"] > 100) == (0, True)


def test_the_study_continues_elsewhere_from_its_records(undisturbed, tmp_path, capsys):
    folder, _, _ = undisturbed
    run(capsys, "study", "report", "pico", "--out", folder, "--to", tmp_path / "report")
    records = tmp_path / "report" / "records.jsonl.gz"
    code, out, _ = run(
        capsys, "study", "run", "pico", "--out", tmp_path / "new", "--reuse", records, CODE, "--json"
    )
    told = json.loads(out)
    assert (code, told["left"], told["taken"]) == (0, 0, told["jobs"])
    assert not (tmp_path / "new" / "artifacts").exists()


def test_killed_at_random_moments_it_ends_with_the_same_results(undisturbed, tmp_path):
    folder, _, took = undisturbed
    chance, killed = random.Random(os.urandom(4)), tmp_path / "killed"
    for _ in range(KILLS):
        with subprocess.Popen(command(killed, *PART), stderr=subprocess.DEVNULL) as process:
            try:
                process.wait(timeout=chance.uniform(3, 3 + max(took / 2, 60) / KILLS))
                break
            except subprocess.TimeoutExpired:
                family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                chance.choice(family).send_signal(signal.SIGKILL)
                time.sleep(chance.uniform(0, 1))
                process.kill()
    done = subprocess.run(command(killed, *PART), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert results(killed, PART) == results(folder, PART)
    assert not any((killed / "work").glob("*"))


def test_ctrl_c_stops_the_workers_and_the_next_run_continues(tmp_path):
    with subprocess.Popen(command(tmp_path / "study", *FEW), stderr=subprocess.PIPE, text=True) as process:
        while not any((tmp_path / "study").glob("results/*.json")):
            assert process.poll() is None
            time.sleep(0.1)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert psutil.wait_procs(workers, timeout=10)[1] == []
    assert subprocess.run(command(tmp_path / "study", *FEW), stderr=subprocess.DEVNULL).returncode == 0
    assert results(tmp_path / "study", FEW)


def test_two_runs_at_once_and_ray_find_the_same(tmp_path):
    pytest.importorskip("ray")
    both = [subprocess.Popen(command(tmp_path / "shared", *FEW), stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    done = subprocess.run(
        command(tmp_path / "ray", *FEW, "--executor", "ray"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "shared", FEW) == results(tmp_path / "ray", FEW)
