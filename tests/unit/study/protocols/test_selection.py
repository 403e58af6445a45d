"""The selection: what depends on what, and the section from results made by hand."""

import pytest

from hiplora.reporting.study.write import write_report
from hiplora.study.engine.jobs import Graph
from hiplora.study.protocols import selection
from tests.unit.study.protocols.made import finish, made_study, measured, results, table

CHANGE = (
    "protocols={selection: {method: hiplora, domain: mathematics, lambdas: [0.1, 1.0, 10.0], gammas: [0.0, 1.0], "
    "ranks: [2, 4, 8]}}"
)


@pytest.fixture
def study(tmp_path):
    found, store = made_study(tmp_path, CHANGE)
    return found, found.recipe.protocols.selection, store


def chosen(store, stage, losses):
    """Say what a sweep found."""
    best = losses.index(min(losses))
    tried = [{"value": value, "mean": loss} for value, loss in zip(stage.values, losses, strict=True)]
    at_the_edge = best in (0, len(losses) - 1)
    finish(store, stage.choice, {"value": stage.values[best], "tried": tried, "at_the_edge": at_the_edge})


def methods(stage):
    """The methods that a sweep trains, as its jobs' settings have them."""
    return [job.settings["recipe"]["method"] for job in stage.choice.needs.values()]


def test_each_sweep_keeps_what_was_chosen_before(study):
    found, settings, _ = study
    price, exponent, rank = selection.stages(found, settings)
    assert [one["stability_weight"] for one in methods(price) if "stability_weight" in one] == [1.0, 10.0]
    assert all("principal_rank" in one and "stability_gamma" not in one for one in methods(price))
    of_price, of_exponent = {"$result": "stability_weight.value"}, {"$result": "stability_gamma.value"}
    assert [one["stability_weight"] for one in methods(exponent)] == [of_price] * 2
    assert [one.get("stability_gamma", 1.0) for one in methods(exponent)] == [0.0, 1.0]
    assert [one.get("principal_rank") for one in methods(rank)] == [2, 4, 8]
    assert [one["stability_gamma"] for one in methods(rank)] == [of_exponent] * 3
    for job in rank.choice.needs.values():
        assert job.needs["stability_weight"] == price.choice
        assert job.needs["stability_gamma"] == exponent.choice


def test_the_residual_rank_is_swept_where_some_are_named_and_k_keeps_it(tmp_path):
    found, _ = made_study(tmp_path, CHANGE.replace("ranks:", "residual_ranks: [3, 5], ranks:"))
    stages = selection.stages(found, found.recipe.protocols.selection)
    assert [stage.symbol for stage in stages] == ["λ", "γ", "r", "k"]
    _, exponent, residual, rank = stages
    assert [one["r"] for one in methods(residual)] == [3, 5]
    assert all(job.needs["stability_gamma"] == exponent.choice for job in residual.choice.needs.values())
    assert [one["r"] for one in methods(rank)] == [{"$result": "r.value"}] * 3
    job = next(iter(rank.choice.needs.values()))
    filled = job.resolved(
        {"rate": {"value": 1e-3}, **{name: {"value": 3} for name in job.needs if name != "rate"}}
    )
    assert filled["recipe"]["method"]["r"] == 3


def test_the_chosen_values_are_filled_in(study):
    found, settings, _ = study
    rank = selection.stages(found, settings)[-1]
    job = next(iter(rank.choice.needs.values()))
    filled = job.resolved(
        {"rate": {"value": 1e-3}, "stability_weight": {"value": 7.0}, "stability_gamma": {"value": 0.5}}
    )
    method = filled["recipe"]["method"]
    assert (method["stability_weight"], method["stability_gamma"]) == (7.0, 0.5)
    assert filled["recipe"]["train"]["lr"] == 1e-3


def test_factors_are_made_anew_for_another_rank_only(study):
    found, settings, _ = study
    kinds = Graph(selection.jobs(found, settings)).counts()
    assert kinds["factorize"] == 3  # k = 4, the method's own, is one of the three
    assert kinds["collect"] == 3 + 1  # the rate is chosen once, of the method as it is given


def test_its_runs_are_of_the_seed_that_rates_are_chosen_by(study, tmp_path):
    found, settings, _ = study
    assert {job.settings["recipe"]["seed"] for job in selection.jobs(found, settings)[0].needs.values()} == {
        7
    }
    other, _ = made_study(tmp_path, CHANGE, "rates=null")
    runs = selection.jobs(other, other.recipe.protocols.selection)[0].needs.values()
    assert {job.settings["recipe"]["seed"] for job in runs} == {42}


def test_all_that_was_tried_is_shown_and_what_was_chosen(study, tmp_path):
    found, settings, store = study
    price, exponent, rank = selection.stages(found, settings)
    chosen(store, price, [1.0, 0.8, 0.9])
    chosen(store, exponent, [0.7, 0.75])
    chosen(store, rank, [0.7, 0.65, 0.6])
    section = selection.section(found, settings, results(store))
    rows = table(section, "selection")
    assert [name for name, cells in rows.items() if cells["Choice"].text] == ["λ = 1", "γ = 0", "k = 8"]
    assert rows["λ = 1"]["Choice"].text == "chosen"
    assert rows["γ = 0"]["Choice"].text == "chosen"  # there is no γ below 0
    assert rows["k = 8"]["Choice"].text == "chosen, at the edge of the grid"
    assert rows["λ = 0.1"]["Held-out loss"].value == 1
    assert "λ = 1, γ = 0, k = 8" in section.text[0]
    assert "At the edge of the grid: k" in section.text[0]
    one = measured(section, "held-out loss", "HiP-LoRA", value=0.6)
    assert one.setting == {"principal_rank": 8, "chosen": True, "at_the_edge": True}
    assert one.jobs == (rank.choice.needs["mathematics-8-7"].key,)
    write_report(tmp_path / "report", "Made", {}, [section], {})


def test_sweeps_appear_one_by_one(study, tmp_path):
    found, settings, store = study
    price, exponent, rank = selection.stages(found, settings)
    chosen(store, price, [1.0, 0.8, 0.9])
    section = selection.section(found, settings, results(store))
    assert list(table(section, "selection")) == ["λ = 0.1", "λ = 1", "λ = 10"]
    assert section.missing == [exponent.choice.name, rank.choice.name]
    write_report(tmp_path / "report", "Made", {}, [section], {})
