"""The merging section from results made by hand."""

import pytest

from hiplora.errors import ConfigError
from hiplora.metrics import mean_post_merge_drop, pass_at_k
from hiplora.reporting.study.write import write_report
from hiplora.study.protocols import merge_fail, merging, single_task
from tests.unit.study.protocols.made import finish, made_study, measured, results, scored, table

CHANGES = (
    "domains={sums: {title: Sums, train: {path: gsm8k_train.jsonl, held_out_fraction: 0.1}, tasks: {gsm8k: 2}}, "
    "code: {title: Code, train: {path: codealpaca.jsonl, held_out_fraction: 0.1}, tasks: {humaneval: 2}}}",
    "rates=null",
    "protocols={merging: {methods: [lora, lora-mlp], rules: {addition: {}, ties: {}}, passing: {humaneval_10: 2}}}",
)
# rule → seed → (gsm8k, humaneval, humaneval_10, KL) of the merged model
BEFORE = ([60, 80], [100, 0], [50, 0])
AFTER = {
    "lora": {
        "addition": {42: ([40, 60], [0, 0], [0, 0], 0.4), 100: ([80, 100], [100, 0], [50, 0], 0.2)},
        "ties": {42: ([60, 80], [100, 0], [50, 0], 0.2), 100: ([60, 80], [100, 0], [50, 0], 0.2)},
    },
    "lora-mlp": {
        "addition": {42: ([50, 70], [100, 0], [50, 0], 0.1), 100: ([50, 70], [100, 0], [50, 0], 0.05)},
        "ties": {42: ([50, 70], [100, 0], [50, 0], 0.1), 100: ([50, 70], [100, 0], [50, 0], 0.1)},
    },
}


@pytest.fixture
def study(tmp_path):
    return filled(tmp_path, AFTER)


def filled(tmp_path, after, *changes):
    found, store = made_study(tmp_path, *CHANGES, *changes)
    settings = found.recipe.protocols.merging
    for method, rules in after.items():
        row = found.row(method)
        for seed in (42, 100):
            own = {domain: found.adapter(row, domain, seed) for domain in ("sums", "code")}
            sums, code, ten = BEFORE
            # Each adapter is right about its own task alone.
            finish(store, found.score(own["sums"]), scored({"gsm8k": sums, "humaneval": [0, 0]}))
            finish(store, found.score(own["code"]), scored({"gsm8k": [0, 0], "humaneval": code}))
            more = found.score(own["code"], {"humaneval_10": 2}, drift=False)
            finish(store, more, scored({"humaneval_10": ten}))
            for rule, seeds in rules.items():
                sums, code, ten, kl = seeds[seed]
                merge = found.merge(own, rule, {}, {"gsm8k": 2, "humaneval": 2}, drift=True)
                finish(store, merge, scored({"gsm8k": sums, "humaneval": code}, {"prose": kl}))
                more = found.merge(own, rule, {}, {"humaneval_10": 2})
                finish(store, more, scored({"humaneval_10": ten}))
    return found, settings, store


def test_before_is_each_domains_own_adapter_and_after_the_merge(study):
    found, settings, store = study
    rows = table(merging.section(found, settings, results(store)), "merging-addition-accuracy")
    assert rows["LoRA, before"]["Sums"].value == 70
    assert rows["LoRA, after"]["Sums"].value == pytest.approx((50 + 90) / 2)
    assert rows["LoRA, Δ"]["Sums"].value == pytest.approx(0)
    assert rows["LoRA, Δ"]["Code"].value == pytest.approx(-25)


def test_pass_rates_follow_from_how_many_samples_of_an_item_passed(study):
    found, settings, store = study
    section = merging.section(found, settings, results(store))
    rows = table(section, "merging-addition-accuracy")
    for k in (1, 5, 10):
        alone = 100 * pass_at_k(10, 5, k) / 2
        assert rows["LoRA, before"][f"Code pass@{k}"].value == pytest.approx(alone)
        assert rows["LoRA, after"][f"Code pass@{k}"].value == pytest.approx(alone / 2)
    assert list(table(section, "merging-addition-likelihood")["LoRA, after"]) == ["Sums", "Code", "Mean drop"]


def test_the_mean_drop_is_that_of_all_metrics_of_all_seeds(study):
    found, settings, store = study
    section = merging.section(found, settings, results(store))
    before = {"sums": 70, "code": 50}
    drop = mean_post_merge_drop([{"sums": 50, "code": 0}, {"sums": 90, "code": 50}], [before, before])
    assert drop == (20 + 50 + 20 + 0) / 4
    one = measured(section, "mean drop", "LoRA", form="likelihood", setting={"rule": "addition"})
    assert (one.value, one.unit, one.seeds) == (pytest.approx(drop), "pp", 2)
    assert one.low <= drop <= one.high
    signed = measured(section, "mean signed drop", "LoRA", form="likelihood", setting={"rule": "addition"})
    assert signed.value == pytest.approx(50 / 4)
    rules = table(section, "merging-rules")
    assert rules["LoRA, TIES"]["Mean drop, likelihood"].value == 0
    assert rules["LoRA, TIES"]["Mean drop, likelihood"].best
    assert rules["LoRA, addition"]["Mean drop, accuracy"].paper == 20.24
    assert rules["LoRA, TIES"]["Mean drop, accuracy"].paper == 13.8


def test_methods_are_compared_rule_by_rule(study):
    found, settings, store = study
    section = merging.section(found, settings, results(store))
    apart = [
        one
        for one in section.measurements
        if one.metric == "mean drop difference" and one.form == "likelihood"
    ]
    told = {one.setting["rule"]: (one.method, one.setting["minus"], one.value) for one in apart}
    assert told == {
        "addition": ("LoRA on the MLPs", "LoRA", pytest.approx(5 - 22.5)),
        "ties": ("LoRA on the MLPs", "LoRA", pytest.approx(5)),
    }
    assert any("moves the scores by 22.5 pp with LoRA" in text for text in section.text)


def test_every_method_is_compared_with_all_before_it(tmp_path):
    three = {**AFTER, "hiplora": AFTER["lora-mlp"]}
    change = f"protocols.merging.methods=[{', '.join(three)}]"
    found, settings, store = filled(tmp_path, three, change)
    section = merging.section(found, settings, results(store))
    apart = {
        (one.method, one.setting["minus"]): one.value
        for one in section.measurements
        if one.metric == "mean drop difference"
        and (one.form, one.setting["rule"]) == ("likelihood", "addition")
    }
    assert apart == {
        ("LoRA on the MLPs", "LoRA"): pytest.approx(-17.5),
        ("HiP-LoRA", "LoRA"): pytest.approx(-17.5),
        ("HiP-LoRA", "LoRA on the MLPs"): pytest.approx(0),
    }


def test_what_the_adapters_learned_alone_is_compared_too(study):
    found, settings, store = study
    section = merging.section(found, settings, results(store))
    alone = measured(section, "score alone", "LoRA", form="likelihood", setting={"rule": "addition"})
    assert (alone.value, alone.unit) == (pytest.approx((70 + 50) / 2), "%")
    apart = measured(
        section,
        "score alone difference",
        "LoRA on the MLPs",
        form="likelihood",
        setting={"minus": "LoRA", "rule": "addition"},
    )
    assert (apart.value, apart.low, apart.high) == (0, 0, 0)


def test_the_drift_of_merged_models_is_compared_seed_by_seed(study):
    found, settings, store = study
    section = merging.section(found, settings, results(store))
    assert table(section, "merging-drift-addition")["LoRA"]["prose"].value == pytest.approx(300)
    ratio = measured(
        section,
        "drift ratio",
        "LoRA on the MLPs",
        setting={"text": "prose", "rule": "addition", "over": "LoRA"},
    )
    assert ratio.value == pytest.approx(0.25)


def test_a_rule_of_a_method_appears_when_all_its_jobs_are_there(study, tmp_path):
    found, settings, store = study
    lost = merging.jobs(found, settings)[-2]
    assert lost.kind == "merge"
    (store.path / "results" / f"{lost.key}.json").unlink()
    section = merging.section(found, settings, results(store))
    assert section.missing == [lost.name]
    assert set(table(section, "merging-rules")) == {
        "LoRA, addition",
        "LoRA on the MLPs, addition",
        "LoRA, TIES",
    }
    write_report(tmp_path / "report", "Made", {}, [section], {})


def test_all_jobs_are_read_and_none_else(study):
    found, settings, store = study
    jobs = set(merging.jobs(found, settings))
    assert all(store.finished(job) for job in jobs)
    assert len(jobs) == 2 * 2 * (3 + 2 * 2)


def test_adapters_and_full_merges_are_those_of_other_protocols(tmp_path):
    asked = (
        "single_task: {methods: [lora]}, merging: {methods: [lora]}, "
        "merge_fail: {methods: [lora], sizes: [4], instances: 100}"
    )
    found, _ = made_study(tmp_path, f"protocols={{{asked}}}")
    protocols = found.recipe.protocols
    merged = merging.jobs(found, protocols.merging)
    alone = [job for job in merged if job.kind == "evaluate"]
    assert set(alone) < set(single_task.jobs(found, protocols.single_task))
    full = {job for job in merged if job.kind == "merge"}
    assert len(full) == 2
    assert full < set(merge_fail.jobs(found, protocols.merge_fail))


def test_a_pass_rate_of_no_domain_is_an_error_that_names_it(tmp_path):
    found, _ = made_study(tmp_path, "protocols={merging: {methods: [lora], passing: {mbpp: 2}}}")
    with pytest.raises(ConfigError, match="'mbpp' is of no domain"):
        merging.jobs(found, found.recipe.protocols.merging)


def test_without_any_result_everything_is_missing(tmp_path):
    found, store = made_study(tmp_path, *CHANGES)
    settings = found.recipe.protocols.merging
    section = merging.section(found, settings, results(store))
    assert section.measurements == []
    assert set(section.missing) == {job.name for job in merging.jobs(found, settings)}
    write_report(tmp_path / "report", "Nothing", {}, [section], {})
