"""Merging and MergeFail from results made by hand."""

import pytest

from hiplora.metrics import merge_fail as merge_fail_share
from hiplora.metrics import pass_at_k
from tests.unit.study.protocols.by_hand import fill, row, scored, study_of, table

CODE = (
    "domains={sums: {title: Sums, train: {path: gsm8k_train.jsonl, held_out_fraction: 0.1}, tasks: {gsm8k: 2}}, "
    "code: {title: Code, train: {path: codealpaca.jsonl, held_out_fraction: 0.1}, tasks: {humaneval_10: 2}}}",
    "rates=null",
)
MERGING = "merging: {methods: [lora, lora-mlp], rules: {addition: {}, ties: {}}}"
# (method, rule, seed) → items of gsm8k, of humaneval_10 after the merge; alone they are [60, 80], [100, 0]
AFTER = {
    ("LoRA", "addition", 42): ([40, 60], [0, 0]),
    ("LoRA", "addition", 100): ([80, 100], [100, 0]),
    **{("LoRA", "ties", seed): ([60, 80], [100, 0]) for seed in (42, 100)},
    **{("LoRA on the MLPs", rule, seed): ([50, 70], [100, 0]) for rule in ("addition", "ties") for seed in (42, 100)},
}


@pytest.fixture
def findings(tmp_path):
    study, _ = study_of(tmp_path, MERGING, *CODE)

    def of(job, at):
        alone = {"sums": ([60, 80], [0, 0]), "code": ([0, 0], [100, 0])}
        sums, code = alone[at["domain"]] if "domain" in at else AFTER[at["method"], at["rule"], at["seed"]]
        return scored({"gsm8k": sums, "humaneval_10": code}, {"prose": 0.1})

    return fill(study, study.recipe.protocols.merging, of)


def test_before_is_each_domains_own_adapter_and_after_the_merge(findings):
    asked = {"rule": "addition", "form": "likelihood"}
    assert row(findings, "merge score", "LoRA", reported="Sums", when="before", **asked).estimate == 70
    assert row(findings, "merge score", "LoRA", reported="Sums", when="after", **asked).estimate == 70
    # |70 − 50|, |50 − 0| in one seed, |70 − 90|, 0 in the other
    drop = row(findings, "mean drop", "LoRA", **asked)
    assert (drop.estimate, drop.seeds) == (pytest.approx((20 + 50 + 20 + 0) / 4), 2)
    assert row(findings, "mean signed drop", "LoRA", **asked).estimate == pytest.approx(50 / 4)
    apart = row(findings, "mean drop difference", "LoRA on the MLPs", minus="LoRA", **asked)
    assert apart.estimate == pytest.approx(5 - 22.5)
    index = table(findings, "merging-addition-likelihood").index
    assert list(index[:3]) == ["LoRA, before", "LoRA, after", "LoRA, drop"]
    assert "(paper: 13.8)" in table(findings, "merging-rules")["mean drop, accuracy"]["LoRA, TIES"]


def test_pass_rates_follow_from_how_many_samples_of_an_item_passed(findings):
    for k, name in ((1, "Code"), (5, "Code pass@5"), (10, "Code pass@10")):
        asked = {"rule": "addition", "form": "accuracy", "reported": name}
        alone = 100 * pass_at_k(10, 10, k) / 2
        scores = [row(findings, "merge score", "LoRA", when=when, **asked).estimate for when in ("before", "after")]
        assert scores == pytest.approx([alone, alone / 2])
    assert "Code pass@5" not in table(findings, "merging-addition-likelihood")


FAIL = "merge_fail: {methods: [lora, lora-mlp], sizes: [2], instances: 9, taus: [0.5, 1.0], drift: true}"
ALONE = [100, 80]  # of every adapter on its own task
# (seed of sums, seed of facts) → items of gsm8k, of mmlu, and KL of the merge
MERGES = {
    "LoRA": {
        (42, 42): ([40, 40], [100, 80], 0.4),  # fails at every threshold
        (42, 100): ([90, 72], [100, 80], 0.4),  # 81 of 90: not below 0.9, below 1
        (100, 42): ([100, 80], [70, 70], 0.4),  # fails at 0.9 and 1
        (100, 100): ([100, 80], [100, 80], 0.4),
    },
    "LoRA on the MLPs": dict.fromkeys([(42, 42), (42, 100), (100, 42), (100, 100)], ([100, 80], [100, 90], 0.1)),
}


def test_a_merge_fails_if_any_of_its_tasks_falls_below_the_threshold(tmp_path):
    study, _ = study_of(tmp_path, FAIL)
    settings = study.recipe.protocols.merge_fail
    tasks, drawn = {"sums": "gsm8k", "facts": "mmlu"}, settings.drawn(study)

    def of(job, at):
        if at["when"] == "before":
            return scored({"gsm8k": [0, 0], "mmlu": [0, 0], tasks[at["domain"]]: ALONE})
        sums, facts, kl = MERGES[at["method"]][tuple(seed for _, seed in drawn[at["merge"]][1])]
        return scored({"gsm8k": sums, "mmlu": facts}, {"prose": kl})

    findings = fill(study, settings, of)
    means = [{"sums": sum(s) / 2, "facts": sum(f) / 2} for s, f, _ in MERGES["LoRA"].values()]
    alone = [{"sums": 90, "facts": 90}] * 4
    for tau in (0.5, 0.9, 1.0):
        one = row(findings, "merge fail", "LoRA", form="accuracy", tau=tau, size="all")
        assert one.estimate == 100 * merge_fail_share(means, alone, tau)
        assert one.low <= one.estimate <= one.high
        assert row(findings, "merge fail", "LoRA on the MLPs", form="accuracy", tau=tau, size="2").estimate == 0
    apart = row(findings, "merge fail difference", "LoRA on the MLPs", form="accuracy", tau=0.9, minus="LoRA")
    assert (apart.estimate, apart.merges) == (-50, 4)
    none = row(findings, "merge fail", "LoRA on the MLPs", form="accuracy", tau=0.9, size="all")
    assert (none.low, none.high) == (0, pytest.approx(100 * (1 - 0.025**0.25)))  # none of four failed
    ratio = row(findings, "drift ratio", "LoRA on the MLPs", text="prose")
    assert ratio.estimate == pytest.approx(0.25)
    assert ratio.low != ratio.low  # merges share their adapters: no interval
    assert "(paper: 62)" in table(findings, "merge-fail-accuracy")["MergeFail, all"]["LoRA, addition"]
