"""Drifts compared run by run."""

import pytest

from hiplora.study.engine.jobs import Job
from hiplora.study.protocols.drifts import drift_measurements

FOUND = {
    "LoRA": {"prose": [0.4, 0.2]},
    "LoRA on the MLPs": {"prose": [0.2, 0.1]},
    "HiP-LoRA": {"prose": [0.02, 0.02]},
    "PiSSA": {},
}
RUNS = {
    method: [Job("merge", 1, method, {"method": method, "seed": seed}) for seed in (42, 100)]
    for method in FOUND
}


def test_every_method_is_compared_with_all_before_it():
    found = list(drift_measurements(FOUND, RUNS, "merging", 2, rule="addition"))
    ratios = {(one.method, one.setting["over"]): one for one in found if one.metric == "drift ratio"}
    assert {pair: one.value for pair, one in ratios.items()} == {
        ("LoRA on the MLPs", "LoRA"): pytest.approx(0.5),
        ("HiP-LoRA", "LoRA"): pytest.approx((0.05 * 0.1) ** 0.5),
        ("HiP-LoRA", "LoRA on the MLPs"): pytest.approx((0.1 * 0.2) ** 0.5),
    }
    one = ratios["HiP-LoRA", "LoRA on the MLPs"]
    assert one.setting == {"text": "prose", "rule": "addition", "over": "LoRA on the MLPs"}
    assert set(one.jobs) == {job.key for name in ("HiP-LoRA", "LoRA on the MLPs") for job in RUNS[name]}


def test_a_method_that_does_not_drift_at_all_has_no_ratio():
    none = {"LoRA": {"prose": [0.4, 0.2]}, "HiP-LoRA": {"prose": [0.0, 0.1]}}
    assert [one.metric for one in drift_measurements(none, RUNS, "merging", 2)] == ["drift", "drift"]


def test_runs_that_share_adapters_have_no_interval():
    found = list(drift_measurements(FOUND, RUNS, "merge-fail", 2, shared=True))
    assert {(one.low, one.high, one.sd) for one in found} == {(None, None, None)}
    assert next(one.value for one in found if one.metric == "drift ratio") == pytest.approx(0.5)


def test_runs_of_one_seed_count_as_one():
    runs = {name: [Job("merge", 1, name, {"method": name, "run": run}) for run in range(4)] for name in RUNS}
    # The ratios of the first seed's two runs are 1/2 and 1/8, of the second's both 1/4: over the seeds none differ.
    found = {"LoRA": {"prose": [0.4, 0.8, 0.4, 0.4]}, "HiP-LoRA": {"prose": [0.2, 0.1, 0.1, 0.1]}}
    told = {(one.method, one.metric): one for one in drift_measurements(found, runs, "merge-fail", 2)}
    ratio = told["HiP-LoRA", "drift ratio"]
    assert [ratio.value, ratio.low, ratio.high] == pytest.approx([0.25] * 3)
    assert told["LoRA", "drift"].sd == pytest.approx(0.2 / 2**0.5)
