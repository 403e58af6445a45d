"""One job: claimed, done, stored; a failure is stored too, and nothing is done twice."""

import os

import pytest

from hiplora.study.execute import run_graph, run_job
from hiplora.study.jobs import Graph, Job
from hiplora.study.steps import Context
from hiplora.study.store import Place, Store


def score(number):
    return Job("evaluate", 1, f"score {number}", {"number": number})


def choice(name="choose", **needs):
    candidates = [{"value": value, "needs": [value]} for value in needs]
    return Job("collect", 1, name, {"field": "loss", "prefer": "low", "candidates": candidates}, needs)


@pytest.fixture
def context(tmp_path):
    return Context(Place(tmp_path / "study", "pico"))


@pytest.fixture
def scored(context):
    """A choice between two finished jobs."""
    for number, loss in enumerate((2.0, 1.0)):
        context.store.finish(score(number), {"loss": loss}, {}, artifact=False)
    return choice(a=score(0), b=score(1))


def test_a_job_is_done_once_and_stored_with_its_time(context, scored):
    with Store(context.store.path).claimed(scored):
        assert run_job(scored, context) == "busy"
    assert not context.store.finished(scored)
    assert (run_job(scored, context), run_job(scored, context)) == ("done", "done")
    assert context.store.result(scored)["value"] == "b"
    assert context.store.record(scored)["timing"]["seconds"] > 0


def test_a_failure_is_stored_with_its_reason(context):
    lost = choice(a=score(0))
    context.store.finish(score(0), {"loss": float("nan")}, {}, artifact=False)
    assert run_job(lost, context) == "failed"
    assert "no candidate has a finite loss" in context.store.failure(lost)["error"]


def test_what_needs_a_diverged_adapter_diverged_too(context):
    bad = Job("train", 1, "train", {})
    context.store.finish(bad, {"diverged": "the loss is nan"}, {}, artifact=False)
    scoring = Job("evaluate", 1, "score", {"tasks": {}, "seed": 0, "drift": None}, {"adapter": bad})
    assert run_job(scoring, context) == "done"
    assert context.store.result(scoring) == {"diverged": "the loss is nan"}


@pytest.mark.slow
def test_workers_do_a_graph_and_a_second_call_has_nothing_to_do(context, scored):
    events = []
    first = choice("first", **scored.needs)
    settings = {"field": "at_the_edge", "candidates": [{"value": 1, "needs": ["first"]}]}
    second = Job("collect", 1, "second", settings, {"first": first})
    graph = Graph([second, choice("blocked", x=score(9))])
    failed = run_graph(graph, context.place, on_event=lambda event, job: events.append((event, job.name)))
    assert [job.name for job in failed] == ["score 9"]
    assert {("done", "second"), ("failed", "score 9")} < set(events)
    assert "blocked" not in dict(map(reversed, events))
    events.clear()
    run_graph(Graph([first]), context.place, on_event=lambda event, job: events.append(event))
    assert events == []


@pytest.mark.slow
def test_a_job_that_kills_its_worker_twice_has_failed_and_the_others_are_done(context, scored, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal\n"
        "from hiplora.study.steps import STEPS\n"
        "STEPS['probe'] = lambda *given: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    deadly = Job("probe", 1, "deadly", {})
    assert run_graph(Graph([deadly, scored]), context.place) == {deadly}
    assert "memory" in context.store.failure(deadly)["error"]
    assert context.store.result(scored)["value"] == "b"
