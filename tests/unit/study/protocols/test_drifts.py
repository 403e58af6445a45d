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
