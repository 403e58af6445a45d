"""The allocation's section from results made by hand."""

import pytest

from hiplora.reporting.study.write import write_report
from hiplora.study.protocols import ablations, allocation
from tests.unit.study.protocols.made import finish, made_study, measured, results, table

CHANGE = (
    "protocols={allocation: {methods: [lora, lora-mlp, hiplora], rank: 4, domains: [mathematics, code]}, "
    "ablations: {method: hiplora, domains: [mathematics, code]}}"
)
SIGMA = [8.0, 4.0, 2.0, 1.0]


def inspected(inside, gains, kinds=("q_proj", "v_proj")):
    """What `inspect` finds: one module of each type."""
    rows = [
        {"module": f"layers.0.{kind}", "layer": 0, "type": kind, "norm": 1.0, "left": inside, "right": inside,
         "both": inside, "sigma": SIGMA, "gains": gains}
        for kind in kinds
    ]  # fmt: skip
    return {"modules": rows, "energy_inside": {"all": inside, **dict.fromkeys(kinds, inside)}}


FOUND = {
    "lora": {"mathematics": inspected(0.4, [1, 2, 3, 4]), "code": inspected(0.6, [1, 2, 3, 4])},
    "lora-mlp": dict.fromkeys(("mathematics", "code"), inspected(0.1, [0, 0, 0, 0], ("up_proj",))),
    "hiplora": {
        "mathematics": inspected(0.2, [-0.08, 0.04, -0.02, 0.01]),  # |δ| rises with σ
        "code": inspected(0.1, [0.08, -0.16, 0.32, 0.64]),  # falls
    },
}


@pytest.fixture
def study(tmp_path):
    found, store = made_study(tmp_path, CHANGE)
    settings = found.recipe.protocols.allocation
    for method, domains in FOUND.items():
        for domain, result in domains.items():
            finish(store, found.inspect(found.adapter(found.row(method), domain, 42), 4), result)
    return found, settings, store


def test_energy_inside_is_shown_for_all_methods_by_module_type(study):
    found, settings, store = study
    rows = table(allocation.section(found, settings, results(store)), "allocation-energy")
    assert rows["LoRA"]["q_proj"].value == rows["LoRA"]["All modules"].value == pytest.approx(50)
    assert rows["LoRA"]["up_proj"].value is None
    assert rows["LoRA on the MLPs"]["up_proj"].value == pytest.approx(10)
    assert rows["HiP-LoRA"]["All modules"].value == pytest.approx(15)


def test_gains_are_set_against_sigma_for_methods_that_have_some(study):
    found, settings, store = study
    section = allocation.section(found, settings, results(store))
    rows = table(section, "allocation-gains")
    assert list(rows) == ["HiP-LoRA, correlation", "HiP-LoRA, median |δ| / σ in %"]
    assert rows["HiP-LoRA, correlation"]["All modules"].value == pytest.approx(0)  # 1 and −1
    assert rows["HiP-LoRA, median |δ| / σ in %"]["q_proj"].value == pytest.approx(1)
    one = next(one for one in section.measurements if one.metric == "gain correlation")
    assert (one.setting["type"], one.low, one.high) == ("all", -1, 1)


def test_each_direction_is_a_dot_over_its_strength_and_over_its_place(study):
    found, settings, store = study
    over_sigma, over_rank = allocation.section(found, settings, results(store)).figures
    assert [part.title for part in over_sigma.parts] == ["q_proj", "v_proj"]
    (series,) = over_sigma.parts[0].series
    assert list(series.x) == SIGMA * 2
    assert list(series.y) == [0.08, 0.04, 0.02, 0.01, 0.08, 0.16, 0.32, 0.64]
    assert list(over_rank.parts[0].series[0].x) == [1, 2, 3, 4] * 2


def test_a_measurement_says_what_it_is_made_of(study):
    found, settings, store = study
    section = allocation.section(found, settings, results(store))
    one = measured(section, "energy inside", "LoRA", setting={"type": "all", "rank": 4})
    assert (one.value, one.unit, len(one.jobs)) == (pytest.approx(50), "%", 2)


def test_its_jobs_are_those_of_the_ablations_full_method(study):
    found, settings, store = study
    jobs = allocation.jobs(found, settings)
    assert all(store.finished(job) for job in jobs)
    shared = set(jobs) & set(ablations.jobs(found, found.recipe.protocols.ablations))
    assert len(shared) == 2


def test_a_method_appears_when_all_its_jobs_are_there(study, tmp_path):
    found, settings, store = study
    lost = allocation.jobs(found, settings)[-1]
    (store.path / "results" / f"{lost.key}.json").unlink()
    section = allocation.section(found, settings, results(store))
    assert list(table(section, "allocation-energy")) == ["LoRA", "LoRA on the MLPs"]
    assert section.figures == []
    assert section.missing == [lost.name]
    write_report(tmp_path / "report", "Made", {}, [section], {})


def test_without_any_result_the_section_can_be_shown(tmp_path):
    found, store = made_study(tmp_path, CHANGE)
    section = allocation.section(found, found.recipe.protocols.allocation, results(store))
    assert section.measurements == []
    write_report(tmp_path / "report", "Nothing", {}, [section], {})
