"""The frontiers of learning against drift from results made by hand."""

import numpy as np
import pytest

from hiplora.errors import ConfigError
from hiplora.study.protocols.frontier import NOT_REACHED, PASSED, REACHED, Frontier
from tests.unit.study.protocols.by_hand import finish, row, scored, study_of, table, tables, trained

FRONTIER = (
    "frontier: {domains: {sums: [lora, lora-mlp, hiplora]}, rates: [0.001, 0.01], plain: [lora, lora-mlp], "
    "reference: hiplora}"
)
# (method, rate) → a seed each: loss, KL on prose (four times that on code), likelihood of the own task
FOUND = {
    ("hiplora", 1e-3): [(2.0, 0.001, 40), (2.0, 0.001, 40)],
    ("hiplora", 1e-2): [(1.5, 0.01, 50), (1.5, 0.01, 50)],
    ("lora", 1e-3): [(2.0, 0.1, 40), (2.0, 0.1, 40)],
    ("lora", 1e-2): [(1.0, 10.0, 60), (1.0, 40.0, 60)],
    ("lora-mlp", 1e-3): [(2.2, 0.05, 30), (2.2, 0.05, 30)],
    ("lora-mlp", 1e-2): [(1.6, 0.1, 45), (1.6, 0.1, 45)],
}
AFTER = {"hiplora": [60, 70], "lora": [40, 60], "lora-mlp": [60, 80]}  # of mmlu; the base: 60, 80
EQUAL = {"metric": "drift ratio at equal loss", "text": "all texts"}


@pytest.fixture
def findings(tmp_path):
    study, store = study_of(tmp_path, FRONTIER)
    names = {study.row(name).title: name for name in AFTER}
    for job, at in study.recipe.protocols.frontier.runs(study):
        if at["method"] == "Base model":
            finish(store, job, scored({"gsm8k": [20, 40], "mmlu": [60, 80]}))
            continue
        method = names[at["method"]]
        loss, kl, own = FOUND[method, at["lr"]][study.recipe.seeds.index(at["seed"])]
        after = scored({"gsm8k": [own, own], "mmlu": AFTER[method]}, {"prose": kl, "code": 4 * kl})
        finish(store, job, after if job.kind == "evaluate" else trained(before=2.5, after=loss))
    return tables(study)


def test_drift_at_equal_loss_is_paired_by_seed_and_bounded_where_a_method_learned_less(findings):
    # Half-way between LoRA's points the KL is √(0.1 · 10) = 1 and √(0.1 · 40) = 2, against 0.01.
    one = row(findings, **EQUAL, method="LoRA", operating=True)
    assert (one.estimate, one.loss, one.state) == (pytest.approx(np.sqrt(100 * 200)), 1.5, "reached")
    assert one.low < one.estimate < one.high
    # LoRA on the MLPs at its own best, 1.6: there the reference is four fifths of the way from 0.001 to 0.01.
    one = row(findings, **EQUAL, method="LoRA on the MLPs", operating=True)
    assert (one.estimate, one.loss) == pytest.approx((0.1 / 10**-2.2, 1.6))
    bound = row(findings, **EQUAL, method="LoRA on the MLPs", operating=False, lr=0.01)
    assert (bound.estimate, bound.state) == (pytest.approx(10), "not reached")
    assert np.isnan(bound.high)
    shown = table(findings, "frontier-sums-rates")["0.01 (loss 1.500)"]
    assert shown["LoRA on the MLPs"] == "≥ 10 (not reached)"


def test_the_best_plain_lora_is_the_one_that_drifts_least_where_it_learned_as_much(findings):
    one = row(findings, **EQUAL, method="Best plain LoRA", operating=True)
    assert one.which == "LoRA on the MLPs"
    assert table(findings, "frontier-sums-equal").index[0] == "Best plain LoRA (LoRA on the MLPs)"
    assert row(findings, **EQUAL, method="Best plain LoRA", operating=False, lr=0.01).which == "LoRA"
    assert table(findings, "frontier-sums-rates").index[0] == "Best plain LoRA (LoRA on the MLPs; LoRA)"
    assert set(findings.figures) == {"frontier-sums-lora"}


def test_what_other_tasks_lose_is_the_fall_of_their_likelihoods(findings):
    assert row(findings, "likelihood drop", "LoRA", lr=0.01).estimate == pytest.approx(20)
    assert row(findings, "likelihood drop", "HiP-LoRA (paper)", lr=0.01).estimate == pytest.approx(5)


def test_a_domain_without_the_reference_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="lacks the `reference` 'hiplora'"):
        study_of(tmp_path, FRONTIER.replace("lora-mlp, hiplora]", "lora-mlp]"))


def envelope(*points):
    """A frontier of points (rate, steps, x, drift); x and drift are one number, or one a seed."""
    rates, steps, x, drift = zip(*points, strict=True)
    x, drift = (np.array(one, float).reshape(len(points), -1) for one in (x, drift))
    return Frontier(np.array(rates), np.array(steps, float), x, np.log(drift))


POINTS = [(1e-3, 10, 2.0, 0.01), (1e-2, 10, 1.0, 1.0)]
BENT = [(1e-3, 10, 2.0, 0.01), (2e-3, 10, 1.9, 1.0), (4e-3, 10, 1.0, 1.0)]
STOPS = [(1e-3, 5, 2.0, 0.01), (1e-3, 10, 1.0, 1.0), (1e-2, 10, 0.5, 5.0)]


@pytest.mark.parametrize(
    ("points", "x", "drift", "state"),
    [
        (POINTS, 1.5, 0.1, REACHED),  # log-linear between neighbours
        ([*POINTS, (2e-3, 5, 0.9, 0.02)], 1.5, 0.02, REACHED),  # a point that learned more with less
        (POINTS, 1.0, 1.0, REACHED),
        (POINTS, 0.5, 1.0, NOT_REACHED),  # where it learned most
        (POINTS, 3.0, 0.01, PASSED),  # all points learned more: the lowest of them
        (BENT, 1.5, 1.0, REACHED),  # straight from the first to the last it would be 0.1
        (BENT[::-1], 1.5, 1.0, REACHED),
        (STOPS, 1.5, 0.1, REACHED),  # early stops at one rate
    ],
)
def test_the_drift_of_a_frontier_at_a_loss(points, x, drift, state):
    reading = envelope(*points).at(x)
    assert (np.exp(reading[0]), reading[2]) == (pytest.approx(drift), state)


ALIKE = [(1e-3, 10, [2.0, 2.0], [0.01, 0.04]), (1e-2, 10, [1.0, 1.0], [1.0, 4.0])]
CROSSED = [(1e-3, 10, [2.0, 1.1], [0.01, 0.01]), (1e-2, 10, [0.8, 1.2], [1.0, 1.0])]  # one seed the other way round


@pytest.mark.parametrize(
    ("points", "mean", "x", "drift"),
    [
        (ALIKE, 1.5, [1.5, 1.5], [0.1, 0.4]),
        (ALIKE, 1.5, [2.0, 1.0], [0.01, 4.0]),
        (ALIKE, 1.5, [9.0, 0.0], [0.01, 4.0]),
        (CROSSED, 1.2, [0.8, 1.3], [1.0, 0.01]),  # takes the point that learned enough
    ],
)
def test_each_seed_goes_along_the_same_points_at_its_own_loss(points, mean, x, drift):
    frontier = envelope(*points)
    assert np.exp(frontier.by_seed(np.array(x), frontier.at(mean)[1])) == pytest.approx(drift)
