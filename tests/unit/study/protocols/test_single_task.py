"""The single-task section from results made by hand."""

import pytest

from hiplora.reporting.study.write import write_report
from hiplora.study.protocols import single_task
from hiplora.study.statistics import spread
from tests.unit.study.protocols.made import finish, made_study, measured, results, scored, table, trained

CHANGES = (
    "domains={sums: {title: Sums, train: {path: gsm8k_train.jsonl, held_out_fraction: 0.1}, tasks: {gsm8k: 2}}, "
    "facts: {title: Facts, train: {path: alpaca.jsonl, held_out_fraction: 0.1}, tasks: {mmlu: 2}}}",
    "rates=null",
    "protocols={single_task: {methods: [lora, lora-mlp]}}",
)
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
BASE = {"gsm8k": [40, 60], "mmlu": [40, 40]}


@pytest.fixture
def study(tmp_path):
    found, store = made_study(tmp_path, *CHANGES)
    settings = found.recipe.protocols.single_task
    finish(store, found.score(), scored(BASE))
    for method, domains in FOUND.items():
        for domain, seeds in domains.items():
            for seed, (sums, facts, kl) in zip(found.seeds(settings), seeds, strict=True):
                adapter = found.adapter(found.row(method), domain, seed)
                finish(store, adapter, trained(100 if method == "lora" else 96))
                result = scored({"gsm8k": sums, "mmlu": facts}, {"prose": kl, "code": 2 * kl})
                finish(store, found.score(adapter), result)
    return found, settings, store


def test_each_domain_is_scored_by_its_own_adapter(study):
    found, settings, store = study
    rows = table(single_task.section(found, settings, results(store)), "single-task-accuracy")
    assert rows["Base model"]["Sums"].value == 50
    assert rows["LoRA"]["Sums"].value == pytest.approx((70 + 90) / 2)
    assert rows["LoRA"]["Facts"].value == pytest.approx((60 + 80) / 2)
    assert rows["LoRA"]["Mean"].value == pytest.approx(75)


def test_retain_is_the_mean_drop_on_the_other_domains(study):
    found, settings, store = study
    section = single_task.section(found, settings, results(store))
    # sums: mmlu falls from 40 to 20 and 30; facts: gsm8k from 50 to 20 and 40
    assert table(section, "single-task-accuracy")["LoRA"]["Retain"].value == pytest.approx((15 + 20) / 2)
    assert table(section, "single-task-accuracy")["LoRA on the MLPs"]["Retain"].value == pytest.approx(0)
    assert table(section, "single-task-accuracy")["LoRA"]["Retain"].paper == 12.3
    one = measured(section, "retain", "LoRA", form="accuracy")
    assert (one.unit, one.seeds, one.sd) == ("pp", 2, pytest.approx(spread([(20 + 30) / 2, (10 + 10) / 2])))
    difference = measured(section, "retain difference", "LoRA on the MLPs", form="accuracy")
    assert difference.value == pytest.approx(-17.5)
    assert difference.setting["minus"] == "LoRA"
    assert len(one.jobs) == 4


def test_drift_is_compared_run_by_run(study):
    found, settings, store = study
    section = single_task.section(found, settings, results(store))
    assert table(section, "single-task-drift")["LoRA"]["prose"].value == pytest.approx(1000 * 0.175)
    ratio = [
        one for one in section.measurements if one.metric == "drift ratio" and one.setting["text"] == "prose"
    ]
    # 1/20 and 1/5 on the two domains, in each seed: the interval is over the seeds, which do not differ.
    assert [(one.low, one.value, one.high) for one in ratio] == [pytest.approx((0.1, 0.1, 0.1))]


def test_the_mismatch_of_trained_parameters_is_shown(study):
    found, settings, store = study
    rows = table(single_task.section(found, settings, results(store)), "single-task-training")
    assert rows["LoRA"]["Trainable parameters"].text == "100"
    assert rows["LoRA on the MLPs"]["Mismatch, %"].value == pytest.approx(-4)
    assert rows["LoRA"]["Held-out loss before"].value == 2


def test_losses_wait_for_all_runs_of_a_method(study):
    found, settings, store = study
    lost = found.adapter(found.row("lora"), "facts", found.seeds(settings)[1])
    (store.path / "results" / f"{lost.key}.json").unlink()
    rows = table(single_task.section(found, settings, results(store)), "single-task-training")
    assert (rows["LoRA"]["Held-out loss before"].value, rows["LoRA"]["Trainable parameters"].text) == (
        None,
        "100",
    )
    assert rows["LoRA on the MLPs"]["Held-out loss before"].value == 2


def test_a_method_without_all_its_runs_has_no_row_and_its_jobs_are_named(study):
    found, settings, store = study
    lost = found.score(found.adapter(found.row("lora-mlp"), "facts", 100))
    (store.path / "results" / f"{lost.key}.json").unlink()
    section = single_task.section(found, settings, results(store))
    assert set(table(section, "single-task-accuracy")) == {"Base model", "LoRA"}
    assert section.missing == [lost.name]


def test_without_any_result_everything_is_missing(tmp_path):
    found, store = made_study(tmp_path, *CHANGES)
    settings = found.recipe.protocols.single_task
    section = single_task.section(found, settings, results(store))
    assert section.measurements == []
    assert found.score().name in section.missing
    write_report(tmp_path / "report", "Nothing", {}, [section], {})


def test_the_section_can_be_shown(study, tmp_path):
    found, settings, store = study
    section = single_task.section(found, settings, results(store))
    assert any("can be told from none" in text for text in section.text)
    page = write_report(tmp_path / "report", "Made", {}, [section], {})
    assert "Retain" in page.read_text()


def test_the_jobs_are_those_that_the_section_reads(study):
    found, settings, store = study
    assert all(store.finished(job) for job in single_task.jobs(found, settings))
    assert len(single_task.jobs(found, settings)) == 1 + 2 * 2 * 2
