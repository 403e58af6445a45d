"""The MergeFail section from results made by hand."""

import pytest

from hiplora import metrics
from hiplora.metrics import merge_instances
from hiplora.reporting.study.write import write_report
from hiplora.study.protocols import merge_fail
from hiplora.study.statistics import hierarchical
from tests.unit.study.protocols.made import finish, made_study, measured, results, scored, table

CHANGES = (
    "domains={sums: {title: Sums, train: {path: gsm8k_train.jsonl, held_out_fraction: 0.1}, tasks: {gsm8k: 2}}, "
    "facts: {title: Facts, train: {path: alpaca.jsonl, held_out_fraction: 0.1}, tasks: {mmlu: 2}}}",
    "rates=null",
    "protocols={merge_fail: {methods: [lora, lora-mlp], sizes: [2], instances: 9, taus: [0.5, 1.0], drift: true}}",
)
TASKS = {"sums": "gsm8k", "facts": "mmlu"}
ALONE = [100, 80]  # of every adapter on its own task
# (seed of sums, seed of facts) → items of gsm8k, of mmlu, and KL of the merge
AFTER = {
    "lora": {
        (42, 42): ([40, 40], [100, 80], 0.4),  # fails at every threshold
        (42, 100): ([90, 72], [100, 80], 0.4),  # 81 of 90: not below 0.9, below 1
        (100, 42): ([100, 80], [70, 70], 0.4),  # fails at 0.9 and 1
        (100, 100): ([100, 80], [100, 80], 0.4),
    },
    "lora-mlp": dict.fromkeys([(42, 42), (42, 100), (100, 42), (100, 100)], ([100, 80], [100, 90], 0.1)),
}


@pytest.fixture
def study(tmp_path):
    found, store = made_study(tmp_path, *CHANGES)
    settings = found.recipe.protocols.merge_fail
    for method, merges in AFTER.items():
        row = found.row(method)
        for domain, task in TASKS.items():
            for seed in (42, 100):
                items = {other: [0, 0] for other in TASKS.values()} | {task: ALONE}
                finish(store, found.score(found.adapter(row, domain, seed)), scored(items))
        for seeds, (sums, facts, kl) in merges.items():
            own = {
                domain: found.adapter(row, domain, seed) for domain, seed in zip(TASKS, seeds, strict=True)
            }
            merge = found.merge(own, "addition", {}, {"gsm8k": 2, "mmlu": 2}, drift=True)
            finish(store, merge, scored({"gsm8k": sums, "mmlu": facts}, {"prose": kl}))
    return found, settings, store


def test_a_merge_fails_if_any_of_its_tasks_falls_below_the_threshold(study):
    found, settings, store = study
    section = merge_fail.section(found, settings, results(store))
    rows = table(section, "merge-fail-thresholds-accuracy")
    means = [{"sums": sum(s) / 2, "facts": sum(f) / 2} for s, f, _ in AFTER["lora"].values()]
    expected = {
        tau: metrics.merge_fail(means, [{"sums": 90, "facts": 90}] * 4, tau) for tau in (0.5, 0.9, 1.0)
    }
    assert list(expected.values()) == [0.25, 0.5, 0.75]
    assert [rows["LoRA, addition"][f"τ = {tau:g}"].value for tau in expected] == [25, 50, 75]
    assert [cell.value for cell in rows["LoRA on the MLPs, addition"].values()] == [0, 0, 0]
    sizes = table(section, "merge-fail-accuracy")["LoRA, addition"]
    assert (sizes["2 adapters (4)"].value, sizes["All"].value, sizes["All"].paper) == (50, 50, 62)


def test_the_intervals_are_over_items_and_the_papers_over_merges_stand_beside(study):
    found, settings, store = study
    section = merge_fail.section(found, settings, results(store))
    setting = {"rule": "addition", "tau": 0.9, "size": "all", "merges": 4}
    wide = hierarchical({"LoRA": [[100, 0, 100, 0]] * 2})["LoRA"]  # each seed draws all four
    setting |= {"hierarchical_low": wide.low, "hierarchical_high": wide.high}
    one = measured(section, "merge fail", "LoRA", form="accuracy", setting=setting)
    # Item by item the second merge keeps exactly 0.9, in any draw of them: its verdict never turns.
    assert (one.low, one.value, one.high) == (50, 50, 50)
    assert (wide.low, wide.high) == (12.5, 87.5)


def test_methods_are_compared_on_the_same_merges(study):
    found, settings, store = study
    section = merge_fail.section(found, settings, results(store))
    apart = [one for one in section.measurements if one.metric == "merge fail difference"]
    told = {(one.form, one.setting["tau"]): (one.method, one.setting["minus"], one.value) for one in apart}
    assert told["accuracy", 0.9] == ("LoRA on the MLPs", "LoRA", -50)
    assert len(told) == 2 * 3
    assert any("50.0 % of LoRA, 0.0 % of LoRA on the MLPs" in text for text in section.text)


def test_the_drift_of_merged_models_is_compared_merge_by_merge(study):
    found, settings, store = study
    section = merge_fail.section(found, settings, results(store))
    assert table(section, "merge-fail-drift-addition")["LoRA"]["prose"].value == pytest.approx(400)
    ratio = measured(section, "drift ratio", "LoRA on the MLPs")
    assert (ratio.value, ratio.low) == (pytest.approx(0.25), None)  # merges of different draws share adapters


def test_the_section_can_be_shown(study, tmp_path):
    found, settings, store = study
    section = merge_fail.section(found, settings, results(store))
    page = write_report(tmp_path / "report", "Made", {}, [section], {})
    assert "MergeFail" in page.read_text()


def test_a_method_without_all_its_merges_has_no_row(study):
    found, settings, store = study
    lost = merge_fail.jobs(found, settings)[-1]
    (store.path / "results" / f"{lost.key}.json").unlink()
    section = merge_fail.section(found, settings, results(store))
    assert set(table(section, "merge-fail-accuracy")) == {"LoRA, addition"}
    assert section.missing == [lost.name]


def test_all_tuples_are_merged_where_there_are_few_and_the_same_by_every_method(study):
    found, settings, store = study
    jobs = set(merge_fail.jobs(found, settings))
    assert all(store.finished(job) for job in jobs)
    assert len(jobs) == 2 * (4 + 4)


def test_without_drift_only_merges_that_others_share_have_it(tmp_path):
    found, _ = made_study(tmp_path, *CHANGES, "protocols.merge_fail.drift=false")
    merges = [job for job in merge_fail.jobs(found, found.recipe.protocols.merge_fail) if job.kind == "merge"]
    with_drift = [job for job in merges if job.settings["drift"] is not None]
    seeds = [[need.settings["recipe"]["seed"] for need in job.needs.values()] for job in with_drift[:2]]
    assert seeds == [[42, 42], [100, 100]]
    assert len(with_drift) == 4
    assert len(merges) == 8


def test_a_merge_is_scored_on_its_own_tasks_alone(tmp_path):
    asked = "protocols={merge_fail: {methods: [lora], sizes: [2], instances: 3}}"
    found, _ = made_study(tmp_path, asked)
    for job in merge_fail.jobs(found, found.recipe.protocols.merge_fail):
        if job.kind == "merge":
            tasks = {found.recipe.domains[domain].task for domain in job.needs}
            assert set(job.settings["tasks"]) == tasks


def test_without_any_result_everything_is_missing(tmp_path):
    found, store = made_study(tmp_path, *CHANGES)
    settings = found.recipe.protocols.merge_fail
    section = merge_fail.section(found, settings, results(store))
    assert section.measurements == []
    assert set(section.missing) == {job.name for job in merge_fail.jobs(found, settings)}
    write_report(tmp_path / "report", "Nothing", {}, [section], {})


def test_merges_are_drawn_for_each_seed(tmp_path):
    found, _ = made_study(tmp_path, *CHANGES, "protocols.merge_fail.instances=1", "seeds=[42, 100, 7]")
    settings = found.recipe.protocols.merge_fail
    drawn = [merge_instances(list(TASKS), [2], [42, 100, 7], 1, seed)[2][0] for seed in (42, 100, 7)]
    by_need = [
        [need.settings["recipe"]["seed"] for need in job.needs.values()]
        for job in dict.fromkeys(merge_fail.jobs(found, settings))
        if job.kind == "merge" and "LoRA," in job.name
    ]
    assert by_need == [[seed for _, seed in instance] for instance in dict.fromkeys(drawn)]
