"""A graph of jobs on the smallest model: undisturbed, by two at once, on a Ray cluster, with jobs that fail.

That kills at random moments change nothing is shown on the whole study (test_study_pico).
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from hiplora.errors import HipLoraError
from hiplora.study.engine.bench import Place
from hiplora.study.engine.jobs import Graph, Job, result
from hiplora.study.engine.local import run_local
from hiplora.study.engine.store import Store
from hiplora.study.engine.todo import todo
from hiplora.study.pico_data import write_pico_data
from hiplora.study.steps import step

pytestmark = pytest.mark.slow

ROWS = {"gsm8k": ("gsm8k_train.jsonl", "question_answer"), "humaneval": ("codealpaca.jsonl", "alpaca")}
DRIFT = {"texts": {"prose": "wikitext2_raw_valid.jsonl"}, "tokens": 128, "window": 64}
CALL = """
import json, sys
from pathlib import Path
from hiplora.study.engine.jobs import Graph
from hiplora.study.engine.bench import Place
from hiplora.study.engine.local import run_local
from hiplora.study.engine.store import Store
store, data, graph, workers = sys.argv[1:]
graph = Graph.from_json(json.loads(Path(graph).read_text()))
left = run_local(graph, Store(store), Place("pico", Path(data)), int(workers))
sys.exit(len(left.failed) + len(left.blocked) + left.open)
"""


def job(kind, name, settings, **needs):
    return Job(kind, step(kind).version, name, settings, needs)


def train(domain, lr, steps=4, **needs):
    path, shape = ROWS[domain]
    recipe = {
        "model": "pico",
        "data": {"path": path, "format": shape, "held_out_fraction": 0.2, "held_out_limit": 8},
        "method": {"name": "lora", "r": 4, "lora_alpha": 8},
        "train": {
            "lr": lr,
            "steps": steps,
            "batch_size": 2,
            "gradient_accumulation": 1,
            "max_length": 128,
            "save_every": 2,
        },
        "seed": 42,
    }
    return job("train", f"train {domain} {lr}", {"recipe": recipe}, **needs)


def scoring(tasks, **more):
    return {"tasks": tasks, "seed": 0, "drift": DRIFT, **more}


def whole_graph():
    """Two rates tried, the better one used in two domains, both adapters scored alone and merged by two rules."""
    tried = {f"lr{rate}": train("gsm8k", rate) for rate in (1e-3, 1e-2)}
    candidates = [{"value": rate, "needs": [f"lr{rate}"]} for rate in (1e-3, 1e-2)]
    choice = {"field": "held_out_after", "prefer": "low", "candidates": candidates}
    rate = job("collect", "choose the rate", choice, **tried)
    adapters = {domain: train(domain, result("rate", "value"), steps=6, rate=rate) for domain in ROWS}
    tasks = {"gsm8k_reference": 4, "mmlu": 4}
    leaves = [job("evaluate", "score the base", scoring(tasks))]
    leaves += [
        job("evaluate", f"score {domain}", scoring(tasks), adapter=adapter)
        for domain, adapter in adapters.items()
    ]
    leaves += [
        job("merge", f"merge by {rule}", scoring(tasks, rule=rule, options={}), **adapters)
        for rule in ("addition", "ties")
    ]
    return Graph(leaves)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_pico_data(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """The study run once by one worker."""
    store, graph, told = Store(tmp_path_factory.mktemp("study") / "undisturbed"), whole_graph(), []
    left = run_local(graph, store, Place("pico", data), on_event=told.append)
    assert [store.failure(one) for one in left.failed] == []
    assert left.open == 0
    return store, graph, told


def results(store, graph):
    return {one.name: Store(store.path).result(one) for one in graph}


def test_every_job_is_done_once_and_told(undisturbed):
    store, graph, told = undisturbed
    assert [event["event"] for event in told] == ["begin", "end"] * len(graph)
    found = results(store, graph)
    rate = found["choose the rate"]
    assert rate["value"] == min(rate["tried"], key=lambda tried: tried["mean"])["value"]
    assert {tried["value"] for tried in rate["tried"]} == {1e-3, 1e-2}
    base, alone = found["score the base"], found["score gsm8k"]
    assert base["drift"] is None
    assert alone["drift"]["prose"]["kl"] > 0
    assert len(alone["tasks"]["mmlu"]["likelihood"]) == 4
    assert alone["tasks"]["gsm8k_reference"]["likelihood"] != base["tasks"]["gsm8k_reference"]["likelihood"]
    merged = [found[f"merge by {rule}"] for rule in ("addition", "ties")]
    assert merged[0]["tasks"] != merged[1]["tasks"]
    assert all(one["drift"]["prose"]["kl"] > 0 for one in merged)


def test_a_second_call_has_nothing_to_do(undisturbed, data):
    store, graph, _ = undisturbed
    told = []
    run_local(graph, store, Place("pico", data), on_event=told.append)
    assert told == []


def call(store, data, graph_file, workers=1):
    arguments = [str(store), str(data), str(graph_file), str(workers)]
    return subprocess.Popen([sys.executable, "-c", CALL, *arguments])


@pytest.fixture
def graph_file(tmp_path):
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(whole_graph().to_json()))
    return path


def test_two_calls_at_once_share_the_work(undisturbed, data, tmp_path, graph_file):
    expected_store, graph, _ = undisturbed
    path = tmp_path / "shared"
    callers = [call(path, data, graph_file) for _ in range(2)]
    assert [caller.wait() for caller in callers] == [0, 0]
    assert results(Store(path), graph) == results(expected_store, graph)


def test_a_failed_job_is_told_and_the_others_go_on(data, tmp_path):
    wrong = job("evaluate", "score no adapter", scoring({"mmlu": 2}), adapter=train("gsm8k", -1.0))
    graph = Graph([wrong, job("evaluate", "score the base", scoring({"mmlu": 2}))])
    store = Store(tmp_path / "failing")
    left = run_local(graph, store, Place("pico", data))
    assert [one.name for one in left.failed] == ["train gsm8k -1.0"]
    assert [one.name for one in left.blocked] == ["score no adapter"]
    assert "lr" in store.failure(left.failed[0])["error"]
    assert store.finished(graph.wanted[1])
    assert todo(graph, store, "another run").open == 2


@pytest.fixture
def deadly(tmp_path, monkeypatch):
    """Whoever does a job dies at it, as one does that needs more memory than there is."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal\n"
        "from hiplora.study.engine.store import Store\n"
        "Store.turn = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


@pytest.mark.parametrize("where", ["local", "ray"])
def test_a_job_that_kills_its_worker_again_and_again_counts_as_failed(data, tmp_path, deadly, where):
    first = train("gsm8k", 1e-3)
    graph = Graph([job("evaluate", "score it", scoring({"mmlu": 2}), adapter=first)])
    store, place = Store(tmp_path / "deadly"), Place("pico", data)
    if where == "ray":
        pytest.importorskip("ray")
        from hiplora.study.engine.grid import run_ray

        left = run_ray(graph, store, place, workers=1)
    else:
        left = run_local(graph, store, place)
    assert (left.failed, [one.name for one in left.blocked]) == ([first], ["score it"])
    assert "memory" in store.failure(first)["error"]


@pytest.mark.parametrize("times", [1, 2])
def test_a_worker_that_ends_before_it_began_a_job_is_replaced_once(data, tmp_path, monkeypatch, times):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, pathlib, signal, sys\n"
        "died = pathlib.Path(__file__).with_name('died')\n"
        "count = len(died.read_text()) if died.exists() else 0\n"
        f"if 'hiplora.study.engine.worker' in sys.orig_argv and count < {times}:\n"
        "    died.write_text('x' * (count + 1))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    graph = Graph(
        [job("factorize", "factors", {"method": {"name": "proj_lora", "preset": "paper"}, "files": {}})]
    )
    store, place = Store(tmp_path / "study"), Place("pico", data)
    if times > 1:
        with pytest.raises(HipLoraError, match=r"2 workers ended \(status -9\) before they began a job"):
            run_local(graph, store, place)
    else:
        assert run_local(graph, store, place).failed == []
        assert store.finished(graph.wanted[0])


def test_on_a_ray_cluster_with_one_worker_killed_and_a_job_that_fails_the_results_are_the_same(
    undisturbed, data, tmp_path, monkeypatch
):
    """The data are named from the folder that this process is in; Ray's are elsewhere."""
    monkeypatch.chdir(data.parent)
    pytest.importorskip("ray")
    from hiplora.study.engine.grid import run_ray

    expected_store, wanted, _ = undisturbed
    wrong = job("evaluate", "score no adapter", scoring({"mmlu": 2}), adapter=train("gsm8k", -1.0))
    graph = Graph([wrong, *wanted.wanted])
    store, killed = Store(tmp_path / "ray"), []
    killer = threading.Thread(target=kill_a_task, args=(store, killed), daemon=True)
    killer.start()
    told = []
    left = run_ray(graph, store, Place("pico", Path(data.name)), workers=2, on_event=told.append)
    assert killed
    assert left.open == 0
    assert [one.name for one in left.failed] == ["train gsm8k -1.0"]
    assert [one.name for one in left.blocked] == ["score no adapter"]
    assert sorted(event["event"] for event in told) == ["end"] * len(wanted) + ["failed"]
    assert {event["workers"] for event in told} == {2}
    assert all(event["seconds"] > 0 for event in told if event["event"] == "end")
    assert results(store, wanted) == results(expected_store, wanted)


def kill_a_task(store, killed):
    """Kill -9 a process of Ray's that is at a job, once the first job is finished."""
    while not any(store.path.glob("results/*.json")):
        time.sleep(0.05)
    while not killed:
        for process in psutil.Process().children(recursive=True):
            if "_do_job" in process.name() or any("_do_job" in part for part in process.cmdline()):
                process.kill()
                killed.append(process.pid)
                return
        time.sleep(0.05)
