"""The section on cost from timings made by hand."""

import pytest

from hiplora.reporting.study.write import write_report
from hiplora.study.protocols import cost, single_task
from hiplora.study.statistics import student
from tests.unit.study.protocols.made import finish, made_study, measured, results, table

CHANGES = (
    "protocols={single_task: {methods: [hiplora]}, "
    "cost: {methods: [lora, hiplora, pissa], domain: mathematics, warmup: 1, steps: 3}}",
)
TIMED = {"lora": (4000.0, 2e9), "hiplora": (3800.0, 2.5e9), "pissa": (4400.0, 2e9)}


def of(found, settings, method):
    """The job that times a method."""
    title = found.row(method).title
    (job,) = [job for job in cost.jobs(found, settings) if job.name == f"time {title}"]
    return job


def filled(tmp_path, gpu=None, reused=False, timed=TIMED):
    found, store = made_study(tmp_path, *CHANGES)
    settings = found.recipe.protocols.cost
    for method, (speed, memory) in timed.items():
        finish(
            store, of(found, settings, method), {"tokens": 100.0, "parameters": 10}, tokens_per_second=speed,
            peak_memory_bytes=memory, step_seconds_median=0.1, gpu=gpu,
        )  # fmt: skip
    factors = found.factors(found.row("hiplora"))
    finish(store, factors, {"bytes": 3e6, "layers": 2}, factorize_seconds=90.0, reused=reused)
    return found, settings, store


@pytest.fixture
def study(tmp_path):
    return filled(tmp_path)


def test_throughput_and_memory_are_shown_with_their_ratio_to_the_first_method(study):
    found, settings, store = study
    rows = table(cost.section(found, settings, results(store)), "cost-table")
    assert rows["LoRA"]["Tokens per second"].value == 4000
    assert rows["LoRA"]["Of LoRA's"].value == 1
    assert rows["HiP-LoRA"]["Of LoRA's"].value == pytest.approx(0.95)
    assert rows["PiSSA"]["Of LoRA's"].value == pytest.approx(1.1)
    assert rows["HiP-LoRA"]["Peak memory, GB"].value == pytest.approx(2.5)
    assert rows["HiP-LoRA"]["Of LoRA's memory"].value == pytest.approx(1.25)


def test_the_factors_cost_minutes_and_bytes_once_and_the_paper_stands_beside(study):
    found, settings, store = study
    rows = table(cost.section(found, settings, results(store)), "cost-table")
    assert rows["HiP-LoRA"]["SVD minutes"].value == pytest.approx(1.5)
    assert rows["HiP-LoRA"]["SVD minutes"].text == ""
    assert rows["HiP-LoRA"]["Cache size, GB"].value == pytest.approx(0.003)
    assert rows["LoRA"]["SVD minutes"].value is None
    assert {name: one.paper for name, one in rows["HiP-LoRA"].items() if one.paper is not None} == {
        "Tokens per second": 40000, "Peak memory, GB": 78.6, "SVD minutes": 18, "Cache size, GB": 0.13,
    }  # fmt: skip


def test_factors_that_were_in_the_cache_are_marked(tmp_path):
    found, settings, store = filled(tmp_path, reused=True)
    section = cost.section(found, settings, results(store))
    assert table(section, "cost-table")["HiP-LoRA"]["SVD minutes"].text == "(cached)"
    assert measured(section, "factors", "HiP-LoRA").setting["reused"] is True


def test_everything_that_is_shown_is_measured(study):
    found, settings, store = study
    section = cost.section(found, settings, results(store))
    assert measured(section, "throughput", "HiP-LoRA").value == 3800
    ratio = measured(section, "throughput ratio", "HiP-LoRA")
    assert (ratio.value, ratio.setting["over"]) == (pytest.approx(0.95), "LoRA")
    assert set(ratio.jobs) == {of(found, settings, method).key for method in ("hiplora", "lora")}
    assert measured(section, "peak memory", "HiP-LoRA").unit == "bytes"
    assert measured(section, "peak memory ratio", "HiP-LoRA").value == pytest.approx(1.25)
    assert (measured(section, "factors", "HiP-LoRA").value, measured(section, "cache", "HiP-LoRA").value) == (
        90,
        3e6,
    )


def test_the_machine_is_that_of_the_jobs_records(study):
    found, settings, store = study
    machine = results(store).machine(of(found, settings, "lora"))
    section = cost.section(found, settings, results(store))
    assert section.text[0].startswith(f"Measured on {machine}, each method")
    assert "over 3 steps after 1 to warm up" in section.text[0]
    assert {one.setting["machine"] for one in section.measurements} == {machine}
    assert section.text[-1] == "Tokens per second, as a share of LoRA's: HiP-LoRA 0.950, PiSSA 1.100."
    assert measured(section, "throughput ratio", "HiP-LoRA").low is None


def test_methods_that_are_timed_in_turn_have_ratios_with_an_interval_over_the_times(tmp_path):
    found, store = made_study(tmp_path, *CHANGES, "protocols.cost.repeats=3")
    settings = found.recipe.protocols.cost
    timed = [job for job in cost.jobs(found, settings) if job.kind == "speed"]
    names = ["time LoRA", "time HiP-LoRA", "time PiSSA"]
    assert [job.name for job in timed] == [
        f"{name}{more}" for more in ("", ", time 2", ", time 3") for name in names
    ]
    assert len({job.key for job in timed}) == 9
    once = [
        job for job in cost.jobs(found, settings.model_copy(update={"repeats": 1})) if job.kind == "speed"
    ]
    assert once == timed[:3]
    speeds = [4000, 3800, 4400, 2000, 1960, 2200, 1000, 930, 1100]  # the machine slows down, for all
    for job, speed in zip(timed, speeds, strict=True):
        finish(
            store,
            job,
            {"tokens": 100.0, "parameters": 10},
            tokens_per_second=speed,
            peak_memory_bytes=speed * 1e6,
        )
    section = cost.section(found, settings, results(store))
    ratio = measured(section, "throughput ratio", "HiP-LoRA")
    expected = student([0.95, 0.98, 0.93])
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx(
        (expected.value, expected.low, expected.high)
    )
    assert len(ratio.jobs) == 6
    assert measured(section, "peak memory", "HiP-LoRA").value == 3.8e9
    assert "3 times in turn with the others" in section.text[0]
    assert "can be told if it is larger than about" in section.text[-1]


def test_a_gpu_is_named_before_the_processor(tmp_path):
    found, settings, store = filled(tmp_path, gpu="Card 9")
    assert cost.section(found, settings, results(store)).text[0].startswith("Measured on Card 9, ")


def test_methods_that_were_timed_on_different_machines_are_told(study):
    found, settings, store = study
    job = of(found, settings, "pissa")
    (store.path / "results" / f"{job.key}.json").unlink()
    finish(
        store, job, {"tokens": 100.0, "parameters": 10}, tokens_per_second=1.0, peak_memory_bytes=None,
        gpu="Card 9",
    )  # fmt: skip
    section = cost.section(found, settings, results(store))
    assert any("different machines" in text for text in section.text)
    assert table(section, "cost-table")["PiSSA"]["Peak memory, GB"].value is None


def test_while_the_first_method_is_missing_there_are_no_ratios(study, tmp_path):
    found, settings, store = study
    lost = of(found, settings, "lora")
    (store.path / "results" / f"{lost.key}.json").unlink()
    section = cost.section(found, settings, results(store))
    rows = table(section, "cost-table")
    assert set(rows) == {"HiP-LoRA", "PiSSA"}
    assert rows["HiP-LoRA"]["Of LoRA's"].value is None
    assert not [one for one in section.measurements if one.metric.endswith("ratio")]
    assert section.missing == [lost.name]
    write_report(tmp_path / "report", "Made", {}, [section], {})


def test_factors_are_those_of_the_trainings(study):
    found, settings, _ = study
    factors = found.factors(found.row("hiplora"))
    assert factors in cost.jobs(found, settings)
    assert list(of(found, settings, "hiplora").needs.values()) == [factors]
    scores = single_task.jobs(found, found.recipe.protocols.single_task)
    assert {job.needs["adapter"].needs["factors"] for job in scores if job.needs} == {factors}


def test_timing_waits_for_no_chosen_rate(study):
    found, settings, _ = study
    assert found.rate(found.row("lora")) is not None
    job = of(found, settings, "lora")
    assert dict(job.needs) == {}
    assert job.settings["recipe"]["train"]["lr"] == found.recipe.train.lr


def test_without_any_result_everything_is_missing(tmp_path):
    found, store = made_study(tmp_path, *CHANGES)
    settings = found.recipe.protocols.cost
    section = cost.section(found, settings, results(store))
    assert (section.measurements, section.text) == ([], [])
    assert {job.name for job in cost.jobs(found, settings) if job.kind == "speed"} <= set(section.missing)
    write_report(tmp_path / "report", "Nothing", {}, [section], {})
