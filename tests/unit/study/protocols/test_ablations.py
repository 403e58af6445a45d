"""The ablations' section from results made by hand."""

import pytest

from hiplora.reporting.study.write import write_report
from hiplora.study.engine.jobs import Graph
from hiplora.study.protocols import ablations, merging, single_task
from tests.unit.study.protocols.made import finish, made_study, measured, results, scored, table, trained

CHANGES = (
    "domains={sums: {title: Sums, train: {path: gsm8k_train.jsonl, held_out_fraction: 0.1}, tasks: {gsm8k: 2}}, "
    "facts: {title: Facts, train: {path: alpaca.jsonl, held_out_fraction: 0.1}, tasks: {mmlu: 2}}}",
    "rates=null",
    "protocols={ablations: {method: hiplora}}",
)
TASKS = {"sums": "gsm8k", "facts": "mmlu"}
FULL, BUDGET, PROJECTION = "HiP-LoRA", "Without stability budget", "Without residual projection"
# variant → its adapters' own score, that on the other task, the merges' score, held-out loss, leak of the update
FOUND = {
    FULL: (80, 40, 76, 1.0, 0.0),
    BUDGET: (90, 20, 60, 0.9, 0.0),
    PROJECTION: (85, 30, 80, 0.95, 0.25),
    "Zero init": (60, 45, 58, 1.5, 0.0),
    "Without principal channel": (75, 42, 70, 1.1, 0.0),
}


@pytest.fixture
def study(tmp_path):
    found, store = made_study(tmp_path, *CHANGES)
    settings = found.recipe.protocols.ablations
    finish(store, found.score(), scored({"gsm8k": [50, 50], "mmlu": [50, 50]}))
    full = found.row("hiplora")
    for row in ablations.variants(found, settings):
        own, other, merged, loss, leak = FOUND[row.title]
        for place, seed in enumerate((42, 100)):
            adapters = {domain: found.adapter(row, domain, seed, like=full) for domain in TASKS}
            first = 3 + (2 if row.title == "Zero init" else 1) * place
            for domain, adapter in adapters.items():
                finish(store, adapter, trained(after=loss, curve=[(1, first), (2, loss + place)]))
                items = {task: [other] * 2 for task in TASKS.values()} | {TASKS[domain]: [own] * 2}
                finish(store, found.score(adapter), scored(items, {"prose": 0.1}))
                module = {"norm": 2.0, "left": 0.5 + leak, "right": 0.5, "both": 0.5}
                finish(store, found.inspect(adapter, 4), {"modules": [module], "energy_inside": {}})
            merge = found.merge(adapters, "addition", {}, {"gsm8k": 2, "mmlu": 2}, drift=True)
            finish(store, merge, scored({task: [merged] * 2 for task in TASKS.values()}, {"prose": 0.1}))
    return found, settings, store


def test_each_variant_changes_one_thing(tmp_path):
    found, _ = made_study(tmp_path, *CHANGES)
    full, budget, projection, zero, gains = (
        row.method for row in ablations.variants(found, found.recipe.protocols.ablations)
    )
    assert full == found.row("hiplora").method
    assert budget.stability_mode == "none"
    assert not projection.residual_projection
    assert zero.init_weights == "zero"
    assert (gains.principal_channel, gains.residual_projection) == (False, True)
    assert {one.principal_rank for one in (full, budget, projection, zero, gains)} == {4}


def test_gains_that_are_taken_out_take_their_settings_along(tmp_path):
    change = (
        "methods.hiplora.method={name: hiplora, preset: paper, stability_weight: 2.0, gain_lr_ratio: 3.0}"
    )
    found, _ = made_study(tmp_path, *CHANGES, change)
    *_, gains = ablations.variants(found, found.recipe.protocols.ablations)
    assert not gains.method.principal_channel


def test_scores_retain_and_losses_stand_in_a_row(study):
    found, settings, store = study
    rows = table(ablations.section(found, settings, results(store)), "ablations-accuracy")
    assert list(rows) == list(FOUND)
    for title, (own, other, _, loss, leak) in FOUND.items():
        assert rows[title]["Sums"].value == rows[title]["Downstream"].value == pytest.approx(own)
        assert rows[title]["Retain"].value == pytest.approx(50 - other)
        assert rows[title]["Held-out loss"].value == pytest.approx(loss)
        assert rows[title]["Leak, %"].value == pytest.approx(100 * leak)
    assert (rows[FULL]["Retain"].paper, rows[BUDGET]["Retain"].paper) == (4.9, 9.8)
    assert rows[PROJECTION]["MergeFail"].paper == 12.5


def test_retain_has_the_p_value_of_flipped_signs_over_the_items(study):
    """Without the budget all four items lose more: one of sixteen sign patterns, and its mirror."""
    found, settings, store = study
    section = ablations.section(found, settings, results(store))
    rows = table(section, "ablations-accuracy")
    assert (rows[FULL]["Retain p"].value, rows[BUDGET]["Retain p"].value) == (None, 0.125)
    assert measured(section, "retain p", BUDGET, form="accuracy").value == 0.125


def test_merges_of_all_domains_fail_by_seed(study):
    found, settings, store = study
    section = ablations.section(found, settings, results(store))
    fails = {title: cells["MergeFail"].value for title, cells in table(section, "ablations-accuracy").items()}
    # 76 of 80, 60 of 90, 80 of 85, 58 of 60, 70 of 75
    assert list(fails.values()) == [0, 100, 0, 0, 0]
    apart = measured(section, "merge fail difference", BUDGET, form="accuracy")
    assert (apart.value, apart.setting["minus"]) == (100, FULL)
    retain = [
        one for one in section.measurements if one.metric == "retain difference" and one.method == BUDGET
    ]
    assert {(one.form, one.value, one.setting["minus"]) for one in retain} == {
        ("accuracy", 20, FULL),
        ("likelihood", 20, FULL),
    }


def test_the_dynamics_are_means_over_domains_and_seeds(study):
    found, settings, store = study
    (figure,) = ablations.section(found, settings, results(store)).figures
    full = figure.series[0]
    assert (full.name, list(full.x), list(full.y)) == (FULL, [1, 2], [3.5, 1.5])
    assert [series.name for series in figure.series] == list(FOUND)


def test_it_is_said_that_zero_init_trains_gains_only(study):
    found, settings, store = study
    assert any(
        "Zero init trains the gains only" in text
        for text in ablations.section(found, settings, results(store)).text
    )


def test_the_full_method_is_that_of_other_protocols_and_variants_take_its_rate(tmp_path):
    asked = "single_task: {methods: [hiplora]}, ablations: {method: hiplora}, merging: {methods: [hiplora]}"
    found, _ = made_study(tmp_path, f"protocols={{{asked}}}")
    protocols = found.recipe.protocols
    jobs = set(ablations.jobs(found, protocols.ablations))
    assert set(single_task.jobs(found, protocols.single_task)) < jobs
    assert set(merging.jobs(found, protocols.merging)) < jobs
    assert len([job for job in Graph(jobs) if job.kind == "collect"]) == 1


def test_only_the_leading_directions_of_a_weight_tell_a_leak(tmp_path):
    change = "methods.hiplora.method={name: hiplora, principal_rank: 4, principal_channel: true}"
    found, _ = made_study(tmp_path, *CHANGES, change)
    assert all(job.kind != "inspect" for job in ablations.jobs(found, found.recipe.protocols.ablations))


def test_a_variant_without_all_its_jobs_has_no_row(study, tmp_path):
    found, settings, store = study
    row = ablations.variants(found, settings)[1]
    lost = found.score(found.adapter(row, "facts", 100, like=found.row("hiplora")))
    (store.path / "results" / f"{lost.key}.json").unlink()
    section = ablations.section(found, settings, results(store))
    assert list(table(section, "ablations-accuracy")) == [title for title in FOUND if title != BUDGET]
    assert section.missing == [lost.name]
    write_report(tmp_path / "report", "Made", {}, [section], {})


def test_without_any_result_the_section_can_be_shown(tmp_path):
    found, store = made_study(tmp_path, *CHANGES)
    section = ablations.section(found, found.recipe.protocols.ablations, results(store))
    assert section.measurements == []
    assert section.missing
    write_report(tmp_path / "report", "Nothing", {}, [section], {})


def test_the_training_losses_of_the_steps_are_compared_seed_by_seed(study):
    found, settings, store = study
    section = ablations.section(found, settings, results(store))
    faster = measured(section, "training loss difference", BUDGET)
    assert faster.setting["minus"] == FULL
    assert (faster.value, faster.low, faster.high) == pytest.approx(
        (-0.05, -0.05, -0.05)
    )  # the same in both seeds
    slower = measured(section, "training loss difference", "Zero init")  # 0.25 and 0.75
    margin = 12.7062 * 0.25  # Student's t with one degree of freedom, times the standard error
    assert (slower.value, slower.low, slower.high) == pytest.approx(
        (0.5, 0.5 - margin, 0.5 + margin), rel=1e-4
    )


def test_without_a_training_there_is_no_difference_of_its_losses(study):
    found, settings, store = study
    full = next(
        job for job in Graph(ablations.jobs(found, settings)) if job.name.startswith("train HiP-LoRA")
    )
    (store.path / "results" / f"{full.key}.json").unlink()
    section = ablations.section(found, settings, results(type(store)(store.path)))
    assert not [one for one in section.measurements if one.metric == "training loss difference"]
