"""Studies on the smallest model: every protocol; interrupted, killed, by several runs at once, and by Ray."""

import contextlib
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
from tests.commands import run
from tests.golden.make import check, of_report

pytestmark = pytest.mark.slow

CODE = "--allow-code-execution"
KINDS = {"train", "evaluate", "merge", "collect", "factorize", "inspect", "edit", "probe", "speed"}
LEFT_OUT = [name for name, _ in load_study("pico").protocols if name not in ("single_task", "merging")]
TRAIN = "{path: %s.jsonl, held_out_fraction: 0.1, held_out_limit: 4}"
FEW = [
    "rates=null",
    "seeds=[42]",
    f"domains={{sums: {{title: Sums, train: {TRAIN % 'gsm8k_train'}, tasks: {{gsm8k_reference: 4}}}}, "
    f"facts: {{title: Facts, train: {TRAIN % 'alpaca'}, tasks: {{mmlu: 4}}}}}}",
    *(f"protocols.{name}=null" for name in LEFT_OUT),
    "protocols.single_task.methods=[split-lora, hiplora]",
    "protocols.merging={methods: [hiplora], rules: {addition: {}}}",
]


def command(folder, *more):
    words = ("study", "run", "pico", "--out", str(folder), "--workers", "2", *more)
    return [sys.executable, "-m", "hiplora", *words]


def few(folder, *more):
    return command(folder, *(f"--set={change}" for change in FEW), *more)


def results(folder):
    opened = open_study(load_study("pico", FEW), folder, None)
    stored = {f"{job.name} {job.key}": opened.store.result(job) for job in opened.graph}
    assert None not in stored.values()
    return stored


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few") / "study"
    done = subprocess.run(few(folder), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return results(folder)


def test_the_whole_study_has_the_golden_numbers_and_is_continued_elsewhere(tmp_path, capsys):
    done = subprocess.run(command(tmp_path / "study", CODE, "--json"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["left"], record["failed"], record["missing_files"]) == (0, {}, [])
    assert set(record["kinds"]) == KINDS
    for name in ("status", "plan"):
        code, out, _ = run(capsys, "study", name, "pico", "--out", tmp_path / "study", "--json")
        assert (code, json.loads(out)["left"]) == (0, 0)
    code, out, _ = run(capsys, "study", "report", "pico", "--out", tmp_path / "study", "--json")
    assert (code, set(json.loads(out)["sections"].values())) == (0, {0})
    differences = check("pico", of_report(tmp_path / "study" / "report"))
    assert not differences, "\n".join(differences[:40])
    records = tmp_path / "study" / "report" / "records.jsonl.gz"
    out = tmp_path / "new"
    code, out, _ = run(capsys, "study", "run", "pico", "--out", out, "--reuse", records, CODE, "--json")
    record = json.loads(out)
    assert (code, record["left"], record["taken"]) == (0, 0, record["jobs"])
    assert not (tmp_path / "new" / "artifacts").exists()


def interrupt(folder):
    """Press Ctrl-C once the first result is there."""
    with subprocess.Popen(few(folder), stderr=subprocess.PIPE, text=True) as process:
        while not any(folder.glob("results/*.json")):
            assert process.poll() is None
            time.sleep(0.1)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert psutil.wait_procs(workers, timeout=10)[1] == []


def kill(folder, chance):
    """Kill a worker or the run itself at a random moment, and the run for good a moment later."""
    with subprocess.Popen(few(folder), stderr=subprocess.DEVNULL) as process:
        time.sleep(chance.uniform(8, 20))
        if process.poll() is None:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            chance.choice(family).send_signal(signal.SIGKILL)
            time.sleep(chance.uniform(0, 1))
            process.kill()


def test_interrupted_and_killed_it_ends_with_the_same_results(undisturbed, tmp_path):
    chance, folder = random.Random(os.urandom(4)), tmp_path / "study"
    interrupt(folder)
    for _ in range(2):
        kill(folder, chance)
    done = subprocess.run(few(folder), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert results(folder) == undisturbed


def test_two_runs_at_once_find_the_same(undisturbed, tmp_path):
    both = [subprocess.Popen(few(tmp_path / "study"), stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert results(tmp_path / "study") == undisturbed


def ray_worker(process):
    """Wait for a process of Ray that is at work on a job of the study."""
    while process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if child.cmdline()[0].startswith("ray::_work"):
                    return child
        time.sleep(0.1)
    raise AssertionError("the study ended before a worker was seen")


def test_ray_finds_the_same_though_a_worker_is_killed_midway(undisturbed, tmp_path):
    pytest.importorskip("ray")
    folder = tmp_path / "study"
    with subprocess.Popen(few(folder, "--executor", "ray"), stderr=subprocess.DEVNULL) as process:
        while not any(folder.glob("results/*.json")) and process.poll() is None:
            time.sleep(0.1)
        ray_worker(process).kill()
    assert process.returncode == 0
    assert results(folder) == undisturbed
