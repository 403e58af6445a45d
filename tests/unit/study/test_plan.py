"""What a study will cost, told before anything is loaded."""

import pytest

from hiplora.errors import ConfigError
from hiplora.recipes.load_study import load_study, own_studies
from hiplora.study.builder import Study
from hiplora.study.estimate import gpu
from hiplora.study.plan import job_costs, open_jobs, plan
from hiplora.study.protocols import graph
from tests.unit.study.protocols.made import finish, made_study

ONE = "protocols={single_task: {methods: [lora]}}"
H100 = gpu("h100")


def planned(recipe, *changes):
    study = Study(load_study(recipe, changes), None)
    jobs = graph(study)
    return plan(study, jobs, {"gpu": H100}, None), jobs


def test_a_model_of_eight_billion_parameters_is_planned_without_its_weights():
    found, _ = planned("paper", ONE)
    machine = found["machines"]["gpu"]
    assert found["parameters"] == pytest.approx(8.03e9, rel=0.01)
    assert machine["fits"]
    # 12 adapters of 2,000 steps of 128 sequences of 2,048 tokens, and 4 rates in one domain
    tokens = machine["kinds"]["train"]["tokens"]
    assert tokens == pytest.approx(16 * 2000 * 128 * 2048, rel=0.02)
    assert machine["kinds"]["train"]["flops"] > 4 * 8e9 * tokens
    assert machine["hours"] > 100
    assert machine["total"]["memory_bytes"] > 2 * 8e9


def test_the_sums_are_those_of_the_jobs():
    found, jobs = planned("pico", ONE)
    costs = job_costs(jobs, "pico", H100)
    total = found["machines"]["gpu"]["total"]
    assert total["jobs"] == len(jobs) == found["left"]
    assert total["flops"] == pytest.approx(sum(cost.flops for cost in costs.values()))
    assert total["memory_bytes"] == max(cost.memory_bytes for cost in costs.values())
    kinds = found["machines"]["gpu"]["kinds"].values()
    assert sum(kind["seconds"] for kind in kinds) == pytest.approx(total["seconds"])


def test_more_steps_cost_more():
    few, many = (planned("pico", ONE, f"train.steps={steps}")[0]["machines"]["gpu"] for steps in (6, 60))
    assert many["kinds"]["train"]["tokens"] > 5 * few["kinds"]["train"]["tokens"]


def test_the_mismatch_of_the_methods_is_told():
    methods = planned("pico")[0]["methods"]
    assert methods["lora"]["mismatch"] == 0
    assert methods["lora-mlp"]["mismatch"] == pytest.approx(100 * (3456 / 3584 - 1))


def test_the_smallest_difference_shrinks_with_the_items():
    few = planned("pico", ONE, "domains.code.tasks.humaneval=4")[0]["power"]["humaneval"]
    many = planned("pico", ONE, "domains.code.tasks.humaneval=16")[0]["power"]["humaneval"]
    assert few["smallest_difference"] == pytest.approx(2 * many["smallest_difference"])


def test_a_task_that_is_asked_whole_has_all_its_items():
    power = planned("pico", ONE, "domains.code.tasks={humaneval: null, lm_evals_own: null}")[0]["power"]
    assert power["humaneval"] == {"items": 164, "smallest_difference": pytest.approx(1.96 * 25 / 164**0.5)}
    assert power["lm_evals_own"]["smallest_difference"] is None


def test_what_is_done_is_not_planned(tmp_path):
    study, store = made_study(tmp_path, ONE)
    jobs = graph(study)
    finish(store, study.score(), {})
    left = open_jobs(jobs, store)
    assert len(left) == len(jobs) - 1
    assert study.score() not in left


@pytest.mark.parametrize("name", own_studies())
def test_every_job_of_the_own_studies_fits_its_model(name):
    found, jobs = planned(name)
    assert found["left"] == len(jobs) > 10


def test_a_probe_of_a_layer_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="layer 9 has none of the modules asked for; they are in 0"):
        planned("pico", "protocols.rank_one.layers=[0, 9]")


def test_files_that_are_not_there_are_named():
    assert "alpaca.jsonl" in planned("pico", ONE)[0]["missing"]


def test_edits_the_frontiers_tasks_and_merges_say_what_they_can_tell():
    found, _ = planned("frontier")
    power = found["power"]
    assert (power["edits of edit-set"]["items"], power["questions after edits"]["items"]) == (120, 100)
    assert power["arc_easy, frontier"] == {
        "items": 20,
        "smallest_difference": pytest.approx(1.96 * 25 / 20**0.5),
    }
    merges = found["merges"]
    assert (1 - merges["may_fail_unseen"] / 100) ** merges["different"] == pytest.approx(0.025)
    assert planned("pico", ONE)[0]["merges"] is None
