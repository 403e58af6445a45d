"""Protocols that look at updates, base weights, choices and costs, from results made by hand."""

import pytest

from hiplora.probing import findings
from tests.unit.study.protocols.made import fill, finish, jobs, made_study, row, table, tables

PAPER = "HiP-LoRA (paper)"


def test_energy_inside_and_how_gains_follow_sigma(tmp_path):
    study, _ = made_study(tmp_path, "allocation: {methods: [lora, hiplora], rank: 2, domains: [sums]}")

    def of(job, labels):
        gains, inside = ([-0.04, 0.01, 0.001], 0.5) if labels["has_gains"] else ([], 0.1)
        module = {"module": "layers.0.q_proj", "type": "q_proj", "sigma": [4.0, 2.0, 1.0], "gains": gains}
        return {"modules": [module], "energy_inside": {"all": inside, "q_proj": inside}}

    found = fill(study, study.recipe.protocols.allocation, of)
    assert row(found, "energy inside", PAPER, type="all").estimate == pytest.approx(50)
    assert row(found, "gain correlation", PAPER, type="q_proj").estimate == pytest.approx(1)
    assert row(found, "median relative gain", PAPER, type="all").estimate == pytest.approx(0.5)
    assert list(table(found, "allocation-energy")) == ["q_proj", "All modules"]
    assert set(found.figures) == {"allocation-sigma"}


def test_speed_is_compared_time_by_time_with_the_first_method(tmp_path):
    asked = "cost: {methods: [lora, hiplora], domain: sums, warmup: 1, steps: 3, repeats: 2}"
    study, store = made_study(tmp_path, asked)
    *timed, factors = jobs(study, study.recipe.protocols.cost)
    for job, speed in zip(timed, (100, 90, 200, 160), strict=True):  # LoRA, HiP-LoRA, and once more
        memory = 2e9 if speed > 95 else 3e9
        finish(store, job, {"tokens": 1}, tokens_per_second=speed, peak_memory_bytes=memory, gpu=None)
    finish(store, factors, {"bytes": 5e8}, factorize_seconds=120.0, reused=False)
    found = tables(study)
    ratio = row(found, "throughput ratio", PAPER, over="LoRA")
    assert ratio.estimate == pytest.approx((0.9 + 0.8) / 2)
    assert ratio.low < 0.8 < 0.9 < ratio.high
    shown = table(found, "cost-table").loc[PAPER]
    assert (shown["SVD minutes"], shown["Cache size, GB"]) == ("2.00 (paper: 18)", "0.5000 (paper: 0.13)")


def test_correlations_of_interventions_with_sigma_and_how_far_they_are_apart(tmp_path):
    study, _ = made_study(tmp_path, "rank_one: {kinds: [zero, flip]}")
    one = {"module": "layers.0.q_proj", "layer": 0, "type": "q_proj", "draw": 0}
    records = [
        {**one, "index": place, "sigma": sigma, "kind": kind, "drop": {"kl": kl, "log_perplexity": sigma}}
        for place, sigma in enumerate((9.0, 4.0, 2.0, 1.0))
        for kind, kl in (("zero", sigma), ("flip", 10 - sigma))
    ]
    result = {"records": records, "correlations": findings(records)}
    found = fill(study, study.recipe.protocols.rank_one, lambda job, labels: result)
    labels = {"of": "kl", "basis": "weight"}
    assert row(found, "pearson", "Zero", type="all", **labels).estimate == pytest.approx(1)
    assert row(found, "pearson difference", "Zero", minus="Flip", **labels).estimate == pytest.approx(2)
    assert "σ = 9.0" in row(found, "pearson without the strongest", "Flip", **labels).without
    assert table(found, "rank-one-weight-kl").loc["Zero", "Directions"] == "4"
