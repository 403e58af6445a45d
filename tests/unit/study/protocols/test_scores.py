"""Protocols that compare scores, from results made by hand: single tasks, λ, ablations, continual tuning."""

import pandas as pd
import pytest

from hiplora.metrics import average_accuracy, backward_transfer, forgetting, learned_accuracy
from hiplora.study.plan import open_study
from hiplora.study.protocols import sections
from hiplora.study.recipe import load_study
from tests.unit.study.protocols.by_hand import fill, finish, row, scored, study_of, table, tables, trained

BASE = {"gsm8k": [40, 60], "mmlu": [40, 40]}
# method → domain of the adapter → (items of gsm8k, items of mmlu, KL), one a seed
FOUND = {
    "lora": {
        "sums": [([60, 80], [10, 30], 0.1), ([80, 100], [30, 30], 0.3)],
        "facts": [([20, 20], [50, 70], 0.1), ([40, 40], [70, 90], 0.2)],
    },
    "lora-mlp": {
        "sums": [([60, 80], [40, 40], 0.005), ([80, 100], [40, 40], 0.015)],
        "facts": [([40, 60], [50, 70], 0.02), ([40, 60], [70, 90], 0.04)],
    },
}


@pytest.fixture
def single(tmp_path):
    study, store = study_of(tmp_path, "single_task: {methods: [lora, lora-mlp]}")
    settings = study.recipe.protocols.single_task
    for job, labels in settings.runs(study)[1:]:
        method = {"LoRA": "lora", "LoRA on the MLPs": "lora-mlp"}[labels["method"]]
        sums, facts, kl = FOUND[method][labels["domain"]][study.recipe.seeds.index(labels["seed"])]
        finish(store, job, scored({"gsm8k": sums, "mmlu": facts}, {"prose": kl}))
        finish(store, job.needs["adapter"], trained(100 if method == "lora" else 96))
    finish(store, study.score(), scored(BASE))
    return study


def test_each_domain_is_scored_by_its_own_adapter_and_retain_on_the_others(single):
    findings = tables(single)
    assert row(findings, "score", "Base model", domain="sums", form="accuracy").estimate == 50
    assert row(findings, "score", "LoRA", domain="sums", form="accuracy").estimate == pytest.approx(80)
    assert row(findings, "mean score", "LoRA", form="accuracy").estimate == pytest.approx(75)
    # sums: mmlu falls from 40 to 20 and 30; facts: gsm8k from 50 to 20 and 40
    retain = row(findings, "retain", "LoRA", form="likelihood")
    assert (retain.estimate, retain.unit, retain.seeds) == (pytest.approx(17.5), "pp", 2)
    assert retain.sd == pytest.approx(pd.Series([25, 10]).std())
    apart = row(findings, "retain difference", "LoRA on the MLPs", form="accuracy", minus="LoRA")
    assert apart.estimate == pytest.approx(-17.5)
    shown = table(findings, "single-task-accuracy")
    assert shown["Retain"]["LoRA"].endswith("(paper: 12.3)")
    assert table(findings, "single-task-training")["Trainable parameters"].tolist() == [100, 96]


def test_a_method_that_is_not_done_is_left_out_and_its_jobs_are_missing(single):
    missing = single.score(single.adapter(single.row("lora-mlp"), "facts", 42))
    (single.store.path / "results" / f"{missing.key}.json").unlink()
    findings = tables(single)
    assert set(findings.measured.method) == {"Base model", "LoRA"}
    assert findings.missing == [missing.name]


def test_a_study_without_results_has_empty_sections(tmp_path):
    empty = sections(open_study(load_study("pico", ("protocols.editing=null",)), tmp_path, None))
    assert [one.name for one in empty if one.name != "claims" and not one.missing] == []
    assert all(one.measured.empty for one in empty)


def test_the_change_of_retain_is_from_the_lowest_price_to_the_highest_in_whatever_order_they_stand(tmp_path):
    study, _ = study_of(tmp_path, "lambda_curve: {method: hiplora, values: [10.0, 0.0, 1.0]}")
    losses = {"λ = 0": 20, "λ = 1": 10, "λ = 10": 5}

    def scores_of(job, labels):
        lost = losses.get(labels["method"].rpartition(", ")[2], 0)
        own = labels.get("domain")
        return scored({task: [50 - lost * (domain != own)] for task, domain in study.tasks.items()})

    settings = study.recipe.protocols.lambda_curve
    change = row(fill(study, settings, scores_of), "retain change", study.row("hiplora").title, form="accuracy")
    assert (change.estimate, change["from"], change["to"]) == (pytest.approx(-15), 0, 10)


# method → seed → stage → (items of mmlu, items of gsm8k)
STAGES = {
    "LoRA": {42: [([80, 90], [10, 10]), ([40, 60], [70, 90])], 100: [([80, 90], [10, 30]), ([60, 60], [70, 70])]},
    "HiP-LoRA (paper)": {seed: [([80, 80], [10, 10]), ([70, 80], [60, 70])] for seed in (42, 100)},
    "Base model": {None: [([20, 40], [0, 20])]},
}


def test_continual_tuning_gives_the_papers_numbers_and_every_cell_of_the_matrix(tmp_path):
    study, _ = study_of(tmp_path, "continual: {methods: [lora, hiplora], orders: [[facts, sums]]}")

    def of(job, labels):
        facts, sums = STAGES[labels["method"]][labels.get("seed")][labels["stage"] - 1]
        return scored({"mmlu": facts, "gsm8k": sums}, {"prose": 0.1})

    findings = fill(study, study.recipe.protocols.continual, of)
    matrix = [[85, 15], [55, 75]]  # LoRA's mean over the seeds
    for metric, function in (
        ("average accuracy", average_accuracy), ("forgetting", forgetting),
        ("backward transfer", backward_transfer), ("learned accuracy", learned_accuracy),
    ):  # fmt: skip
        assert row(findings, metric, "LoRA", form="accuracy").estimate == pytest.approx(function(matrix))
    fall = row(findings, "forgetting", "LoRA", form="accuracy")
    # Items of mmlu, mean over the seeds: 80, 90 fall to 50, 60. Whichever are drawn, the fall is 30.
    assert (fall.low, fall.high) == pytest.approx((30, 30))
    assert row(findings, "score", "LoRA", form="accuracy", stage=2, domain="facts").estimate == 55
    assert row(findings, "average accuracy", "Base model", form="accuracy").estimate == 20
    ratio = row(findings, "forgetting ratio", "HiP-LoRA (paper)", form="accuracy", over="LoRA")
    assert ratio.estimate == pytest.approx(5 / 30)
    rows = list(table(findings, "continual-stages-accuracy").index[:3])
    assert rows == ["Base model", "LoRA, after Facts", "LoRA, after Sums"]


def test_numbers_of_several_orders_are_their_means_and_only_the_function_aware_basis_widens(tmp_path):
    asked = "continual: {methods: [lora, hiplora-activation], orders: [[facts, sums], [sums, facts]], seeds: [42]}"
    study, _ = study_of(tmp_path, asked)

    def of(job, labels):
        recipe = job.needs["adapter"].settings["recipe"] if "adapter" in job.needs else {"train": {}}
        assert recipe["train"].get("widen", False) == (labels["method"] == "HiP-LoRA" and labels["stage"] == 2)
        falls = labels["stage"] == 2 and labels["order"] == "order 1"
        return scored({"mmlu": [20, 40] if falls else [60, 80], "gsm8k": [50, 70]})

    findings = fill(study, study.recipe.protocols.continual, of)
    falls = [row(findings, "forgetting", "LoRA", form="accuracy", order=order) for order in ("order 1", "order 2", "")]
    assert [one.estimate for one in falls] == pytest.approx([40, 0, 20])
