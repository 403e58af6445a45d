"""One job: claimed, done, stored; a failure is stored too, and nothing is done twice."""

import os
import signal

import pytest

from hiplora.study.context import Context, Place
from hiplora.study.execute import run_graph, run_job
from hiplora.study.jobs import Graph, Job
from hiplora.study.store import Store, todo


def score(number):
    return Job("evaluate", 1, f"score {number}", {"number": number})


def choice(name="choose", **needs):
    candidates = [{"value": value, "needs": [value]} for value in needs]
    return Job("collect", 1, name, {"field": "loss", "prefer": "low", "candidates": candidates}, needs)


@pytest.fixture
def context(tmp_path):
    return Context(Store(tmp_path / "study"), Place("pico"))


@pytest.fixture
def scored(context):
    """A choice between two finished jobs."""
    for number, loss in enumerate((2.0, 1.0)):
        context.store.finish(score(number), {"loss": loss}, {}, artifact=False)
    return choice(a=score(0), b=score(1))


def test_a_job_is_done_and_stored_with_its_time(context, scored):
    assert run_job(scored, context, "run") == "done"
    assert context.store.result(scored)["value"] == "b"
    assert context.store.record(scored)["timing"]["seconds"] > 0
    assert run_job(scored, context, "run") == "done"


def test_a_job_that_another_process_holds_is_left_alone(context, scored):
    with Store(context.store.path).claimed(scored):
        assert run_job(scored, context, "run") == "busy"
    assert not context.store.finished(scored)


def test_a_failure_is_stored_with_its_reason(context):
    lost = choice(a=score(0))
    context.store.finish(score(0), {"loss": float("nan")}, {}, artifact=False)
    assert run_job(lost, context, "run") == "failed"
    assert "no candidate has a finite loss" in context.store.failure(lost)["error"]
    assert todo(Graph([lost]), context.store, "run").failed == [lost]


def test_what_needs_a_diverged_adapter_diverged_too(context):
    bad = Job("train", 1, "train", {})
    context.store.finish(bad, {"diverged": "the loss is nan"}, {}, artifact=False)
    scoring = Job(
        "evaluate", 1, "score it", {"tasks": {"mmlu": 2}, "seed": 0, "drift": None}, {"adapter": bad}
    )
    assert run_job(scoring, context, "run") == "done"
    assert context.store.result(scoring) == {"diverged": "the loss is nan"}


@pytest.mark.slow
def test_workers_do_a_graph_and_a_second_call_has_nothing_to_do(context, scored):
    told = []
    first = choice("first", **scored.needs)
    graph = Graph([Job("collect", 1, "second", {"field": "at_the_edge", "prefer": "low", "candidates": [
        {"value": 1, "needs": ["first"]}]}, {"first": first}), choice("broken", x=score(9))])  # fmt: skip
    context.store.fail(score(9), ValueError("x"), "earlier")
    left = run_graph(
        graph, context.store, context.place, on_event=lambda event, job: told.append((event, job.name))
    )
    assert [job.name for job in left.failed] == ["score 9"]
    assert [job.name for job in left.blocked] == ["broken"]
    assert ("done", "second") in told
    assert ("failed", "score 9") in told
    told.clear()
    run_graph(Graph([first]), context.store, context.place, on_event=lambda event, job: told.append(event))
    assert told == []


@pytest.mark.slow
def test_a_job_that_kills_its_worker_twice_has_failed_and_the_others_are_done(
    context, scored, tmp_path, monkeypatch
):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal\n"
        "from hiplora.study import steps\n"
        "real = steps.step\n"
        "def step(kind):\n"
        "    if kind == 'probe':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(kind)\n"
        "steps.step = step\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    deadly = Job("probe", 1, "deadly", {})
    left = run_graph(Graph([deadly, scored]), context.store, context.place)
    assert left.failed == [deadly]
    assert "memory" in context.store.failure(deadly)["error"]
    assert context.store.result(scored)["value"] == "b"
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
