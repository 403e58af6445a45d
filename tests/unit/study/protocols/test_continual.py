"""The section on continual tuning from results made by hand."""

import numpy as np
import pytest

from hiplora.metrics import average_accuracy, backward_transfer, forgetting, learned_accuracy
from hiplora.reporting.study.write import write_report
from hiplora.study.protocols import continual, single_task
from hiplora.study.protocols.continual_runs import Learner
from hiplora.study.statistics import spread
from tests.unit.study.protocols.made import finish, made_study, measured, results, scored, table

CHANGES = (
    "domains={sums: {title: Sums, train: {path: gsm8k_train.jsonl, held_out_fraction: 0.1}, tasks: {gsm8k: 2}}, "
    "facts: {title: Facts, train: {path: alpaca.jsonl, held_out_fraction: 0.1}, tasks: {mmlu: 2}}}",
    "rates=null",
    "protocols={single_task: {methods: [lora]}, continual: {methods: [lora, hiplora], order: [facts, sums]}}",
)
BASE = {"mmlu": [20, 40], "gsm8k": [0, 20]}
# method → seed → stage → (items of mmlu, items of gsm8k, KL); mmlu is the first task
FOUND = {
    "lora": {
        42: [([80, 90], [10, 10], 0.1), ([40, 60], [70, 90], 0.4)],
        100: [([80, 90], [10, 30], 0.1), ([60, 60], [70, 70], 0.2)],
    },
    "hiplora": {
        42: [([80, 80], [10, 10], 0.1), ([70, 80], [60, 80], 0.04)],
        100: [([80, 80], [10, 10], 0.1), ([70, 80], [60, 60], 0.02)],
    },
}
LORA = [[85, 15], [55, 75]]  # its mean over the seeds
HIPLORA = [[80, 10], [75, 65]]


def stages(found, method, seed):
    """The jobs that train a method on one domain after the other."""
    first = found.adapter(found.row(method), "facts", seed)
    return [first, found.adapter(found.row(method), "sums", seed, start=first)]


@pytest.fixture
def study(tmp_path):
    found, store = made_study(tmp_path, *CHANGES)
    settings = found.recipe.protocols.continual
    finish(store, found.score(), scored(BASE))
    for method, seeds in FOUND.items():
        for seed, made in seeds.items():
            for adapter, (facts, sums, kl) in zip(stages(found, method, seed), made, strict=True):
                result = scored({"mmlu": facts, "gsm8k": sums}, {"prose": kl, "code": 2 * kl})
                finish(store, found.score(adapter), result)
    return found, settings, store


@pytest.mark.parametrize("form", ["accuracy", "likelihood"])
def test_the_papers_numbers_are_there_for_every_method(study, form):
    found, settings, store = study
    rows = table(continual.section(found, settings, results(store)), f"continual-{form}")
    for title, matrix in (("LoRA", LORA), ("HiP-LoRA", HIPLORA)):
        assert rows[title]["AvgAcc"].value == pytest.approx(average_accuracy(matrix))
        assert rows[title]["Forgetting"].value == pytest.approx(forgetting(matrix))
        assert rows[title]["Backward transfer"].value == pytest.approx(backward_transfer(matrix))
        assert rows[title]["Just after training"].value == pytest.approx(learned_accuracy(matrix))
    assert rows["LoRA"]["Forgetting"].value == pytest.approx(85 - 55)
    assert rows["Base model"]["AvgAcc"].value == pytest.approx((30 + 10) / 2)
    assert rows["Base model"]["Forgetting"].value is None
    assert rows["HiP-LoRA"]["Forgetting"].best
    assert not rows["LoRA"]["Forgetting"].best
    assert rows["LoRA"]["Forgetting"].paper == (13.6 if form == "accuracy" else None)


def test_intervals_are_those_of_the_numbers_computed_anew_in_every_replicate(study):
    found, settings, store = study
    one = measured(continual.section(found, settings, results(store)), "forgetting", "LoRA", form="accuracy")
    # Items of mmlu, mean over the seeds: 80, 90 fall to 50, 60. Whichever are drawn, the fall is 30.
    assert (one.value, one.low, one.high) == (pytest.approx(30), pytest.approx(30), pytest.approx(30))
    assert (one.unit, one.seeds, one.sd) == ("pp", 2, pytest.approx(spread([85 - 50, 85 - 60])))
    mean = measured(
        continual.section(found, settings, results(store)), "average accuracy", "LoRA", form="accuracy"
    )
    # mmlu 50, 60 and gsm8k 70, 80: the mean lies between 60 and 70, and both are reached.
    assert (mean.low, mean.value, mean.high) == (pytest.approx(60), pytest.approx(65), pytest.approx(70))


def test_methods_are_compared_on_the_same_items(study):
    found, settings, store = study
    section = continual.section(found, settings, results(store))
    apart = measured(section, "forgetting difference", "HiP-LoRA", form="accuracy")
    assert (apart.value, apart.setting["minus"], apart.unit) == (pytest.approx(5 - 30), "LoRA", "pp")
    ratio = measured(section, "forgetting ratio", "HiP-LoRA", form="accuracy")
    assert (ratio.value, ratio.setting) == (pytest.approx(5 / 30), {"over": "LoRA"})
    assert 0 < ratio.high < 1


def test_where_the_other_forgets_nothing_a_ratio_is_infinite_and_has_no_interval(study):
    found, settings, store = study
    for seed in (42, 100):
        last = found.score(stages(found, "lora", seed)[-1])
        (store.path / "results" / f"{last.key}.json").unlink()
        finish(store, last, scored({"mmlu": [80, 90], "gsm8k": [70, 90]}, {"prose": 0.1}))
    section = continual.section(found, settings, results(store))
    ratio = measured(section, "forgetting ratio", "HiP-LoRA", form="accuracy")
    assert (ratio.value, ratio.low, ratio.high) == (float("inf"), None, None)


def test_the_whole_matrix_is_there_with_the_base_above_it(study):
    found, settings, store = study
    section = continual.section(found, settings, results(store))
    rows = table(section, "continual-stages-accuracy")
    assert list(rows)[:3] == ["Base model", "LoRA, after Facts", "LoRA, after Sums"]
    assert rows["Base model"]["Sums"].value == 10
    assert rows["LoRA, after Facts"]["Sums"].value == pytest.approx(15)
    assert rows["LoRA, after Sums"]["Facts"].low == pytest.approx(50)
    grids = {figure.name: figure for figure in section.figures}
    assert set(grids) == {"continual-matrix-accuracy", "continual-matrix-likelihood"}
    lora, hiplora = grids["continual-matrix-accuracy"].parts
    assert lora.row_names == ["base", "after Facts", "after Sums"]
    assert np.allclose(lora.values, [[30, 10], *LORA])
    assert np.allclose(hiplora.values, [[30, 10], *HIPLORA])


def test_every_cell_of_the_matrix_is_a_measurement_of_its_stages_jobs(study):
    found, settings, store = study
    section = continual.section(found, settings, results(store))
    one = measured(section, "score", "LoRA", form="accuracy", setting={"stage": 2, "task": 1})
    assert (one.value, one.domain, one.sd) == (pytest.approx(55), "facts", pytest.approx(spread([50, 60])))
    assert set(one.jobs) == {found.score(stages(found, "lora", seed)[-1]).key for seed in (42, 100)}
    base = measured(section, "score", "Base model", form="accuracy", domain="facts")
    assert (base.value, base.setting, base.jobs) == (30, {"stage": 0}, (found.score().key,))


def test_drift_is_that_after_the_last_stage_seed_by_seed(study):
    found, settings, store = study
    section = continual.section(found, settings, results(store))
    rows = table(section, "continual-drift")
    assert rows["LoRA"]["prose"].value == pytest.approx(300)
    assert rows["HiP-LoRA"]["code"].value == pytest.approx(60)
    ratio = measured(section, "drift ratio", "HiP-LoRA", setting={"text": "prose", "over": "LoRA"})
    assert ratio.value == pytest.approx(0.1)


def test_the_first_stage_is_the_single_task_adapter(study):
    found, settings, _ = study
    alone = set(single_task.jobs(found, found.recipe.protocols.single_task))
    for seed in (42, 100):
        first, last = (found.score(adapter) for adapter in stages(found, "lora", seed))
        assert {first, last} < set(continual.jobs(found, settings))
        assert first in alone
        assert last not in alone
    assert found.score() in alone & set(continual.jobs(found, settings))


def test_a_stage_carries_on_from_the_one_before(study):
    found, settings, _ = study
    last = [job for job in continual.jobs(found, settings) if "after" in job.name]
    assert len(last) == 2 * 2
    for job in last:
        start = job.needs["adapter"].needs["start"]
        assert (start.kind, "start" in start.needs) == ("train", False)


def test_all_jobs_are_read_and_none_else(study):
    found, settings, store = study
    jobs = set(continual.jobs(found, settings))
    assert all(store.finished(job) for job in jobs)
    assert len(jobs) == 1 + 2 * 2 * 2


def test_a_method_that_cannot_carry_on_has_no_row_and_its_jobs_are_named(study, tmp_path):
    found, settings, store = study
    lost = [found.score(stages(found, "hiplora", seed)[-1]) for seed in (42, 100)]
    for job in lost:
        (store.path / "results" / f"{job.key}.json").unlink()
    section = continual.section(found, settings, results(store))
    assert set(table(section, "continual-accuracy")) == {"Base model", "LoRA"}
    assert set(table(section, "continual-drift")) == {"LoRA"}
    assert set(section.missing) == {job.name for job in lost}
    write_report(tmp_path / "report", "Made", {}, [section], {})


def test_without_the_base_the_methods_are_shown_alone(study):
    found, settings, store = study
    (store.path / "results" / f"{found.score().key}.json").unlink()
    section = continual.section(found, settings, results(store))
    assert set(table(section, "continual-accuracy")) == {"LoRA", "HiP-LoRA"}
    assert section.figures[0].parts[0].row_names == ["after Facts", "after Sums"]


def test_the_text_says_what_was_kept_what_was_lost_and_what_can_be_told(study, tmp_path):
    found, settings, store = study
    section = continual.section(found, settings, results(store))
    assert (
        "LoRA 65.0, HiP-LoRA 70.0 (the base: 20.0). Forgetting, in pp: LoRA 30.0, HiP-LoRA 5.0."
        in section.text[0]
    )
    assert "can be told from none if it is larger than about" in section.text[0]
    assert "Forgetting" in write_report(tmp_path / "report", "Made", {}, [section], {}).read_text()


def test_without_any_result_everything_is_missing(tmp_path):
    found, store = made_study(tmp_path, *CHANGES)
    settings = found.recipe.protocols.continual
    section = continual.section(found, settings, results(store))
    assert (section.measurements, section.text, section.figures) == ([], [], [])
    assert set(section.missing) == {job.name for job in continual.jobs(found, settings)}
    write_report(tmp_path / "report", "Nothing", {}, [section], {})


def test_forgetting_is_of_each_run_and_not_of_their_mean():
    runs = np.array([[[60, 0], [80, 0], [50, 0]], [[80, 0], [60, 0], [50, 0]]], dtype=float)
    by_seed = np.concatenate([runs, np.zeros((2, 3, 1))], axis=2)[..., None]  # three tasks, no replicates
    learner = Learner("LoRA", by_seed, [])
    assert learner.seeds("forgetting") == [15, 15]
    assert learner.metric("forgetting")[0] == 15
    assert forgetting(learner.matrix[..., 0]) == 10
