"""A job's key covers everything its result depends on, and nothing else; a graph has each job once."""

from hiplora.study.jobs import Graph, Job, filled, result


def job(name="a job", kind="collect", version=1, settings=None, **needs):
    return Job(kind, version, name, settings or {}, needs)


def test_the_key_depends_on_kind_version_settings_and_needs_alone():
    one = job("one", settings={"a": 1, "b": {"c": 2, "d": 3}})
    assert one == job("other", settings={"b": {"d": 3, "c": 2}, "a": 1})
    options = {"settings": {"a": 1}}
    others = [
        job(kind="train", **options),
        job(version=2, **options),
        job(settings={"a": 2}),
        job(up=job(), **options),
    ]
    assert len({job(**options), *others, *(job(up=other) for other in (job(**options), *others))}) == 10


def test_results_of_other_jobs_are_filled_in_at_any_depth():
    asked = {"train": {"lr": result("rate", "value")}, "list": [result("rate", "value"), 3]}
    assert filled(asked, {"rate": {"value": 0.5}}) == {"train": {"lr": 0.5}, "list": [0.5, 3]}


def test_a_graph_has_each_job_once_and_needs_first():
    base = job(settings={"n": 0})
    left, right = job(settings={"n": 1}, up=base), job(settings={"n": 2}, up=base)
    top = job(settings={"n": 3}, left=left, right=right)
    order = list(Graph([top, left]))
    assert len(order) == 4
    assert order.index(base) < order.index(left) < order.index(top)
