"""Records are whole and final, locks are held by one, and a study goes on elsewhere from its records alone."""

import gzip
import json
import multiprocessing

import pytest

from hiplora.errors import ConfigError, HipLoraError
from hiplora.study.engine.jobs import Graph, Job
from hiplora.study.engine.store import Store, export
from hiplora.study.engine.todo import done, todo


def collect(number, **needs):
    return Job("collect", 1, f"collect {number}", {"number": number}, needs)


def train(number, **needs):
    return Job("train", 1, f"train {number}", {"number": number}, needs)


def evaluate(number, **needs):
    return Job("evaluate", 1, f"evaluate {number}", {"number": number}, needs)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "study")


def names(jobs):
    return [job.name for job in jobs]


def test_a_finished_job_has_its_result_and_says_where_it_comes_from(store):
    job = collect(1, up=collect(0))
    assert store.result(job) is None
    store.finish(job, {"value": 3}, {"seconds": 1.5}, artifact=False)
    record = Store(store.path).record(job)
    assert record["result"] == {"value": 3}
    assert record["timing"] == {"seconds": 1.5}
    assert record["needs"] == {"up": collect(0).key}
    assert record["provenance"]["libraries"]["torch"]


def test_the_first_record_of_a_job_stays(store):
    store.finish(collect(1), {"value": 1}, {}, artifact=False)
    Store(store.path).finish(collect(1), {"value": 2}, {}, artifact=False)
    assert Store(store.path).result(collect(1)) == {"value": 1}


def test_a_record_that_is_no_json_is_named_with_the_way_out(store):
    store.finish(collect(1), {}, {}, artifact=False)
    (store.path / "results" / f"{collect(1).key}.json").write_text("{")
    with pytest.raises(HipLoraError, match="remove the file"):
        Store(store.path).record(collect(1))


def hold(path, held, end):
    with Store(path).claimed(collect(1)) as mine:
        assert mine
        held.set()
        end.wait()


def test_a_job_is_claimed_by_one_process_and_free_again_when_that_is_killed(store):
    context = multiprocessing.get_context("spawn")
    held, end = context.Event(), context.Event()
    other = context.Process(target=hold, args=(store.path, held, end))
    other.start()
    assert held.wait(60)
    with store.claimed(collect(1)) as mine:
        assert not mine
    assert store.at_work(collect(1))
    other.kill()
    other.join()
    assert not store.at_work(collect(1))
    with store.claimed(collect(1)) as mine:
        assert mine


def test_what_is_left_goes_by_needs(store):
    graph = Graph([collect(2, up=collect(1)), collect(3)])
    left = todo(graph, store, "run")
    assert (names(left.ready), names(left.waiting)) == (["collect 1", "collect 3"], ["collect 2"])
    store.finish(collect(1), {}, {}, artifact=False)
    left = todo(graph, store, "run")
    assert (names(left.ready), names(left.waiting)) == (["collect 2", "collect 3"], [])


def test_what_hangs_on_a_failed_job_is_blocked_and_the_rest_goes_on(store):
    graph = Graph([collect(4, up=collect(2, up=collect(1))), collect(3)])
    store.fail(collect(1), ValueError("no luck"), "run")
    left = todo(graph, store, "run")
    assert names(left.failed) == ["collect 1"]
    assert names(left.blocked) == ["collect 2", "collect 4"]
    assert names(left.ready) == ["collect 3"]
    assert "no luck" in store.failure(collect(1))["error"]


def test_the_next_run_tries_a_failed_job_again(store):
    store.fail(collect(1), ValueError("no luck"), "run")
    assert names(todo(Graph([collect(1)]), store, "another").ready) == ["collect 1"]
    store.finish(collect(1), {}, {}, artifact=False)
    assert store.failure(collect(1)) is None


def test_two_runs_at_once_each_try_a_failing_job_once(store):
    graph = Graph([collect(1)])
    for run in ("one", "other"):
        assert names(todo(graph, store, run).ready) == ["collect 1"]
        store.fail(collect(1), ValueError(f"no luck in {run}"), run)
    for run in ("one", "other"):
        assert names(todo(graph, store, run).failed) == ["collect 1"]
    assert store.failure(collect(1))["error"] == "no luck in other"


def test_nothing_is_done_again_upstream_of_what_is_there(store):
    """Records brought from elsewhere are enough; adapters are made only for what still reads them."""
    adapter = train(1)
    first, second = evaluate(1, adapter=adapter), evaluate(2, adapter=adapter)
    for job in (adapter, first):
        store.finish(job, {}, {}, artifact=False)
    assert todo(Graph([first]), store, "run").open == 0
    left = todo(Graph([first, second]), store, "run")
    assert (names(left.ready), names(left.waiting)) == (["train 1"], ["evaluate 2"])
    assert not done(adapter, store, for_artifact=True)
    store.finish(adapter, {}, {}, artifact=True)
    assert names(todo(Graph([first, second]), store, "run").ready) == ["evaluate 2"]


def test_a_choice_among_trainings_needs_their_results_only(store):
    adapter = train(1)
    store.finish(adapter, {}, {}, artifact=False)
    assert names(todo(Graph([collect(1, a=adapter)]), store, "run").ready) == ["collect 1"]


@pytest.mark.parametrize("name", ["records.jsonl", "records.jsonl.gz"])
def test_records_go_to_another_store_and_come_out_with_the_same_bytes(store, tmp_path, name):
    jobs = [collect(number) for number in range(3)]
    for job in jobs[:2]:
        store.finish(job, {"value": job.settings["number"]}, {}, artifact=False)
    assert export(store, jobs, tmp_path / name) == 2
    other = Store(tmp_path / "other")
    assert other.take(tmp_path / name) == 2
    assert other.take(tmp_path / name) == 0
    assert [other.result(job) for job in jobs] == [{"value": 0}, {"value": 1}, None]
    export(other, reversed(jobs), tmp_path / f"again-{name}")
    assert (tmp_path / name).read_bytes() == (tmp_path / f"again-{name}").read_bytes()


@pytest.mark.parametrize(
    "text",
    [b"{}", b"no json", gzip.compress(b"[1]", mtime=0)],
    ids=[
        "no record",
        "no JSON",
        "gzipped",
    ],  # of bytes that hold the time pytest would make a new name each second
)
def test_a_file_without_records_is_refused(store, tmp_path, text):
    (tmp_path / "records.jsonl").write_bytes(text)
    with pytest.raises(ConfigError, match=r"records\.jsonl"):
        store.take(tmp_path / "records.jsonl")
    with pytest.raises(ConfigError, match="missing"):
        store.take(tmp_path / "missing.jsonl")


@pytest.mark.parametrize(
    "change", [{"key": "../../evil"}, {"key": "0" * 20}, {"settings": {"number": 7}}, {"result": None}]
)
def test_a_record_that_is_not_what_its_key_says_is_refused(store, tmp_path, change):
    store.finish(collect(1), {"value": 1}, {}, artifact=False)
    record = {**store.record(collect(1)), **change}
    (tmp_path / "records.jsonl").write_text(json.dumps({k: v for k, v in record.items() if v is not None}))
    other = Store(tmp_path / "other" / "deep")
    with pytest.raises(ConfigError, match="is not what its key says"):
        other.take(tmp_path / "records.jsonl")
    assert not list(tmp_path.rglob("evil*"))
    assert not (tmp_path / "other").exists()
