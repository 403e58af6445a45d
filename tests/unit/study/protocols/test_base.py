"""Protocols that look at updates, base weights, choices and costs, from results made by hand."""

import pytest

from hiplora.metrics import student_margin
from tests.unit.study.protocols.by_hand import finish, jobs, row, study_of, table, tables

PAPER = "HiP-LoRA (paper)"


def test_speed_is_compared_time_by_time_with_the_first_method(tmp_path):
    asked = "cost: {methods: [lora, hiplora], domain: sums, warmup: 1, steps: 3, repeats: 2}"
    study, store = study_of(tmp_path, asked)
    *timed, factors = jobs(study, study.recipe.protocols.cost)
    for job, speed in zip(timed, (100, 90, 200, 160), strict=True):  # LoRA, HiP-LoRA, and once more
        memory = 2e9 if speed > 95 else 3e9
        finish(store, job, {"tokens": 1}, tokens_per_second=speed, peak_memory_bytes=memory, gpu=None)
    finish(store, factors, {"bytes": 5e8}, factorize_seconds=120.0, reused=False)
    findings = tables(study)
    ratio = row(findings, "throughput ratio", PAPER, over="LoRA")
    assert ratio.estimate == pytest.approx((0.9 + 0.8) / 2)
    assert ratio.low < 0.8 < 0.9 < ratio.high
    assert ratio.high - ratio.estimate == pytest.approx(student_margin(ratio.sd, 2))  # so a claim's test is Student's
    shown = table(findings, "cost-table").loc[PAPER]
    assert (shown["SVD minutes"], shown["Cache size, GB"]) == ("2.00 (paper: 18)", "0.5000 (paper: 0.13)")
