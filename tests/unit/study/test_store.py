"""Records are whole and final, a lock has one holder, and a study continues elsewhere from its records alone."""

import gzip
import json
import multiprocessing

import pytest

from hiplora.errors import ConfigError, HipLoraError
from hiplora.study.jobs import Graph, Job
from hiplora.study.store import Store


def job(kind, number, **needs):
    return Job(kind, 1, f"{kind} {number}", {"number": number}, needs)


def collect(number, **needs):
    return job("collect", number, **needs)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "study")


def test_a_finished_job_has_its_result_and_provenance(store):
    one = collect(1, up=collect(0))
    assert store.result(one) is None
    store.finish(one, {"value": 3}, {"seconds": 1.5}, artifact=False)
    record = Store(store.path).record(one)
    assert (record["result"], record["timing"]) == ({"value": 3}, {"seconds": 1.5})
    assert record["needs"] == {"up": collect(0).key}
    assert record["provenance"]["libraries"]["torch"]
    Store(store.path).finish(one, {"value": 4}, {}, artifact=False)
    assert Store(store.path).result(one) == {"value": 3}  # the first record stays


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_record_is_named_with_the_way_out(store, text):
    store.finish(collect(1), {}, {}, artifact=False)
    (store.path / "results" / f"{collect(1).key}.json").write_text(text)
    with pytest.raises(HipLoraError, match="remove the file"):
        Store(store.path).record(collect(1))


def hold(path, held, end):
    with Store(path).claimed(collect(1)) as mine:
        assert mine
        held.set()
        end.wait()


@pytest.mark.slow
def test_a_claim_ends_with_its_process(store):
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


def ready(graph, store):
    left = store.unfinished(graph)
    return [job.name for job in left if left[job]], [job.name for job in left if not left[job]]


def test_a_failure_is_kept_until_the_job_succeeds(store):
    note = store.path / "failures" / f"{collect(1).key}.json"
    store.fail(collect(1), ValueError("no luck"))
    assert store.failure(collect(1))["error"] == "no luck"
    note.write_text("{")  # damaged
    assert store.failure(collect(1)) is None
    store.finish(collect(1), {}, {}, artifact=False)
    assert not note.exists()


def test_reused_records_are_enough_but_for_adapters_that_are_still_read(store):
    adapter = job("train", 1)
    first, second = (job("evaluate", n, adapter=adapter) for n in range(2))
    choice = collect(1, a=adapter)
    for one in (adapter, first):
        store.finish(one, {}, {}, artifact=False)
    assert ready(Graph([first]), store) == ([], [])
    assert ready(Graph([choice]), store) == (["collect 1"], [])  # it reads the result alone
    assert ready(Graph([first, second]), store) == (["train 1"], ["evaluate 1"])
    assert not store.readable(adapter)
    store.finish(adapter, {}, {}, artifact=True)
    assert ready(Graph([first, second]), store) == (["evaluate 1"], [])


def test_exported_records_are_taken_by_another_store(store, tmp_path):
    path, again = tmp_path / "records.jsonl.gz", tmp_path / "again.jsonl.gz"
    jobs = [collect(number) for number in range(3)]
    for one in jobs[:2]:
        store.finish(one, {"value": one.settings["number"]}, {}, artifact=False)
    store.export(jobs, path)
    other = Store(tmp_path / "other")
    assert (other.take(path), other.take(path)) == (2, 0)
    assert [other.result(one) for one in jobs] == [{"value": 0}, {"value": 1}, None]
    other.export(reversed(jobs), again)
    assert path.read_bytes() == again.read_bytes()


GZIPPED = gzip.compress(b"[1]" * 9, mtime=0)


@pytest.mark.parametrize("text", [b"{}", b"no json", GZIPPED, GZIPPED[:-6], GZIPPED[:11] + b"\xff" + GZIPPED[12:]])
def test_a_file_without_records_is_refused(store, tmp_path, text):
    for name in ("records.jsonl", "records.jsonl.gz"):
        (tmp_path / name).write_bytes(text)
    for name in ("records.jsonl", "records.jsonl.gz", "missing.jsonl"):
        with pytest.raises(ConfigError, match=f"{name}: cannot be read"):
            store.take(tmp_path / name)


@pytest.mark.parametrize(
    "change", [{"key": "../../evil"}, {"key": "0" * 20}, {"settings": {"number": 7}}, {"result": None}]
)
def test_a_record_that_does_not_match_its_key_is_refused(store, tmp_path, change):
    store.finish(collect(1), {"value": 1}, {}, artifact=False)
    record = {**store.record(collect(1)), **change}
    (tmp_path / "records.jsonl").write_text(json.dumps({k: v for k, v in record.items() if v is not None}))
    with pytest.raises(ConfigError, match="does not match its key"):
        Store(tmp_path / "other" / "deep").take(tmp_path / "records.jsonl")
    assert not list(tmp_path.rglob("evil*"))
