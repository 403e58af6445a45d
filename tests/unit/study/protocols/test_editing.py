"""The section on editing from results made by hand."""

import pytest

from hiplora.reporting.study.write import write_report
from hiplora.study.protocols import editing
from hiplora.study.statistics import spread
from tests.unit.study.protocols.made import finish, made_study, measured, results, table

CHANGES = (
    "rates=null",
    "protocols={editing: {methods: [lora, hiplora], modes: [batch], alphaedit: {layers: [0]}, "
    "sets: {facts: {title: Facts}}, questions: 2, lr: {hiplora: 0.5}}}",
)
CATEGORIES = ("Relation/Fact", "Entity/Attribute", "Entity/Attribute", "Temporal/Numeric")


def records(index, success, paraphrase=None, exact=None, neighbours=None):
    """A stage's records of some edits: 0 and 1 for each."""
    exact = exact or [0] * len(index)
    return {
        "index": list(index),
        "category": [CATEGORIES[place] for place in index],
        "success": success,
        "preferred": success,
        "exact": exact,
        "paraphrase_success": paraphrase or [0] * len(index),
        "neighbours_kept": neighbours,
    }


def questions(correct=(1, 0), unchanged=(1, 0), log_prob=(-2.0, -3.0), edited=(-5.0, -5.0)):
    """What the model says to two unrelated questions, of which the base answers both right."""
    return {
        "correct_before": [1, 1],
        "correct": list(correct),
        "unchanged": list(unchanged),
        "log_prob_before": [-1.0, -1.0],
        "log_prob": list(log_prob),
        "edited_log_prob_before": [-6.0, -6.0],
        "edited_log_prob": list(edited),
    }


def edits(*stages, mode="batch", asked=None, kl=None):
    """What `edit` finds."""
    drift = None if kl is None else {"prose": {"kl": kl, "perplexity_ratio": 1.0}}
    return {"mode": mode, "stages": [{"records": one} for one in stages], "questions": asked, "drift": drift}


# method → seed → what it found: two batches of two edits
FOUND = {
    "lora": {
        42: edits(
            records([0, 1], [1, 1], [1, 0]), records([2, 3], [1, 0], [1, 0], exact=[1, 0]), asked=questions(), kl=0.4
        ),
        100: edits(
            records([0, 1], [1, 1], [1, 0]), records([2, 3], [0, 0], [1, 0]), asked=questions((1, 1), (0, 0)), kl=0.2
        ),
    },
    "hiplora": {
        seed: edits(
            records([0, 1], [1, 1], [1, 1]), records([2, 3], [1, 1], [1, 0]),
            asked=questions((1, 1), (1, 0), (-1.0, -2.0), (-6.0, -5.0)), kl=kl,
        )
        for seed, kl in ((42, 0.04), (100, 0.02))
    },
    "alphaedit": {
        seed: edits(
            records([0, 1], [0, 0]), records([2, 3], [0, 1]), asked=questions((1, 1), (1, 1)), kl=0.01
        )
        for seed in (42, 100)
    },
}  # fmt: skip


def run(found, settings, method, seed, name="facts", mode="batch"):
    """The one job of a method, seed, set and mode."""
    title = "AlphaEdit" if method == "alphaedit" else found.row(method).title
    wanted = f"edit {name} by {title}, {mode}, seed {seed}"
    (job,) = [job for job in editing.jobs(found, settings) if job.name == wanted]
    return job


def filled(tmp_path, made, *changes):
    """A study in whose store the runs are done: method → seed → what was found."""
    found, store = made_study(tmp_path, *(changes or CHANGES))
    settings = found.recipe.protocols.editing
    for method, seeds in made.items():
        for seed, result in seeds.items():
            finish(store, run(found, settings, method, seed, mode=result["mode"]), result)
    return found, settings, store


@pytest.fixture
def study(tmp_path):
    return filled(tmp_path, FOUND)


def told(section, metric, method, **setting):
    """The one measurement of a metric whose setting has no more than these beside set and mode."""
    return measured(section, metric, method, setting={"set": "facts", "mode": "batch", **setting})


def test_success_is_that_of_all_batches_by_both_definitions_and_in_other_words(study):
    found, settings, store = study
    rows = table(editing.section(found, settings, results(store)), "editing-facts-batch")
    # Means over the seeds, edit by edit: 1, 1, 1/2, 0
    assert rows["LoRA"]["Edit success"].value == pytest.approx(100 * 2.5 / 4)
    assert rows["LoRA"]["Match"].value == pytest.approx(100 * 0.5 / 4)
    assert rows["LoRA"]["Paraphrase"].value == pytest.approx(50)
    assert rows["HiP-LoRA"]["Edit success"].value == 100
    assert rows["HiP-LoRA"]["Edit success"].best
    assert rows["AlphaEdit"]["log p(new) > log p(old)"].value == pytest.approx(25)
    assert rows["LoRA"]["Edit success"].paper == 86.4


def test_locality_is_the_accuracy_that_unrelated_questions_lose_and_their_answers_log_probability(study):
    found, settings, store = study
    section = editing.section(found, settings, results(store))
    rows = table(section, "editing-facts-batch")
    assert rows["LoRA"]["Locality: accuracy lost"].value == pytest.approx(
        25
    )  # one of two, with one of two seeds
    assert rows["LoRA"]["Answers changed"].value == pytest.approx(75)
    assert rows["LoRA"]["Log p of unrelated answers"].value == pytest.approx((-1 - 2) / 2)
    assert rows["LoRA"]["Log p of edited targets"].value == pytest.approx(1)
    assert rows["HiP-LoRA"]["Log p of edited targets"].value == pytest.approx(0.5)
    one = told(section, "locality damage", "LoRA")
    assert (one.unit, one.items, one.seeds, one.sd) == ("%", 2, 2, pytest.approx(spread([50, 100])))
    assert (told(section, "locality", "LoRA").unit, told(section, "edit success", "LoRA").items) == ("pp", 4)


def test_new_answers_where_they_do_not_belong_are_no_good_thing(study):
    found, settings, store = study
    rows = table(editing.section(found, settings, results(store)), "editing-facts-batch")
    assert rows["HiP-LoRA"]["Log p of edited targets"].best
    assert not rows["LoRA"]["Log p of edited targets"].best


def test_methods_are_compared_on_the_same_edits_and_questions(study):
    found, settings, store = study
    section = editing.section(found, settings, results(store))
    apart = told(section, "edit success difference", "HiP-LoRA", minus="LoRA")
    assert (apart.value, apart.unit) == (pytest.approx(37.5), "pp")
    assert told(section, "locality difference", "HiP-LoRA", minus="LoRA").value == pytest.approx(-25)
    nats = told(section, "log-probability change difference", "HiP-LoRA", minus="LoRA")
    assert (nats.value, nats.unit) == (pytest.approx(1), "nats")
    assert nats.low == nats.high == pytest.approx(1)  # of each question: paired, it does not vary
    ratio = told(section, "locality damage ratio", "HiP-LoRA", over="LoRA")
    assert ratio.value == pytest.approx(50 / 75)


def test_there_is_no_ratio_to_a_method_that_may_have_changed_nothing(study):
    found, settings, store = study
    section = editing.section(found, settings, results(store))
    ratios = {
        (one.method, one.setting["over"])
        for one in section.measurements
        if one.metric == "locality damage ratio"
    }
    assert ratios == {
        ("HiP-LoRA", "LoRA"),
        ("AlphaEdit", "LoRA"),
    }  # none over HiP-LoRA, which may change none


def test_drift_stands_beside_and_is_compared_seed_by_seed(study):
    found, settings, store = study
    section = editing.section(found, settings, results(store))
    assert table(section, "editing-facts-batch")["LoRA"]["Drift, prose"].value == pytest.approx(300)
    ratio = told(section, "drift ratio", "HiP-LoRA", text="prose", over="LoRA")
    assert ratio.value == pytest.approx(0.1)


def test_success_by_category_is_a_table_and_measurements(study):
    found, settings, store = study
    section = editing.section(found, settings, results(store))
    rows = table(section, "editing-facts-batch-categories")
    assert list(rows["LoRA"])[::2] == [f"{name}, edit" for name in sorted(set(CATEGORIES))]
    assert rows["LoRA"]["Entity/Attribute, edit"].value == pytest.approx(75)
    assert rows["LoRA"]["Relation/Fact, paraphrase"].value == 100
    one = told(section, "edit success by category", "LoRA", category="Entity/Attribute")
    assert (one.value, one.items, one.sd) == (pytest.approx(75), 2, pytest.approx(spread([100, 50])))


def test_one_by_one_an_edit_is_known_by_its_index_whichever_seed_drew_it(tmp_path):
    changes = (CHANGES[0], CHANGES[1].replace("modes: [batch]", "modes: [single], sample: 2"))
    made = {
        "lora": {
            42: edits(records([0], [1]), records([2], [0]), mode="single", asked=questions()),
            100: edits(records([2], [1]), records([3], [0]), mode="single", asked=questions()),
        }
    }
    found, settings, store = filled(tmp_path, made, *changes)
    section = editing.section(found, settings, results(store))
    # Edit 0 took, 2 did with one seed of two, 3 did not.
    one = measured(section, "edit success", "LoRA", setting={"set": "facts", "mode": "single"})
    assert (one.value, one.items, one.sd) == (pytest.approx(50), 3, 0)
    rows = table(section, "editing-facts-single-categories")
    assert {name: cell.value for name, cell in rows["LoRA"].items() if name.endswith("edit")} == {
        "Relation/Fact, edit": 100,
        "Entity/Attribute, edit": 50,
        "Temporal/Numeric, edit": 0,
    }


def test_of_a_sequence_what_still_works_at_the_end_counts_and_its_course_is_drawn(tmp_path):
    changes = (CHANGES[0], CHANGES[1].replace("modes: [batch]", "modes: [sequential], edits_per_batch: 2"))
    made = {
        "lora": {
            42: edits(records([0, 1], [1, 1]), records([0, 1, 2, 3], [0, 0, 1, 1]), mode="sequential"),
            100: edits(records([0, 1], [1, 0]), records([0, 1, 2, 3], [0, 0, 1, 0]), mode="sequential"),
        }
    }
    found, settings, store = filled(tmp_path, made, *changes)
    section = editing.section(found, settings, results(store))
    last = measured(section, "edit success", "LoRA", setting={"set": "facts", "mode": "sequential"})
    assert (last.value, last.items) == (pytest.approx(100 * 1.5 / 4), 4)
    (figure,) = section.figures
    assert figure.name == "editing-facts-sequence"
    (series,) = figure.series
    assert (series.x, series.y) == ([2, 4], [pytest.approx(75), pytest.approx(37.5)])
    assert series.low[0] == pytest.approx(50)
    so_far = [one for one in section.measurements if one.metric == "edit success so far"]
    assert [(one.setting["stage"], one.setting["edits"], one.value) for one in so_far] == [
        (1, 2, 75),
        (2, 4, 37.5),
    ]


def test_neighbours_count_by_the_edits_that_have_some(tmp_path):
    made = {
        "lora": {
            seed: edits(records([0, 1, 2], [1, 1, 1], neighbours=[[1, 0], [], [1, 1]]), records([3], [1]))
            for seed in (42, 100)
        }
    }
    found, settings, store = filled(tmp_path, made)
    section = editing.section(found, settings, results(store))
    one = told(section, "neighbours kept", "LoRA")
    assert (one.value, one.items) == (pytest.approx(75), 2)
    assert table(section, "editing-facts-batch")["LoRA"]["Neighbours kept"].value == pytest.approx(75)


def test_without_questions_there_is_no_locality(tmp_path):
    made = {"lora": {seed: edits(records([0, 1], [1, 0])) for seed in (42, 100)}}
    found, settings, store = filled(tmp_path, made)
    section = editing.section(found, settings, results(store))
    assert "Answers changed" not in table(section, "editing-facts-batch")["LoRA"]
    assert not [one for one in section.measurements if one.metric.startswith("locality")]


def test_the_papers_values_stand_beside_its_own_kind_of_edits_alone(tmp_path):
    changes = (CHANGES[0], CHANGES[1].replace("{title: Facts}", "{edits: counterfact.jsonl}"))
    found, settings, store = filled(tmp_path, FOUND, *changes)
    rows = table(editing.section(found, settings, results(store)), "editing-facts-batch")
    assert rows["LoRA"]["Edit success"].paper is None


def test_a_rate_that_was_chosen_for_tasks_is_not_that_of_edits(tmp_path):
    changes = ("rates={grid: [0.001, 0.002]}", "train.lr=0.03", CHANGES[1])
    found, _ = made_study(tmp_path, *changes)
    settings = found.recipe.protocols.editing
    assert found.rate(found.row("lora")) is not None
    rates = {
        method: run(found, settings, method, 42).settings["lr"] for method in ("lora", "hiplora", "alphaedit")
    }
    assert rates == {"lora": 0.03, "hiplora": 0.5, "alphaedit": None}
    assert "rate" not in run(found, settings, "lora", 42).needs


def test_the_rates_of_the_edits_are_told(study):
    found, settings, store = study
    (shown,) = [
        one for one in editing.section(found, settings, results(store)).tables if one.name.endswith("batch")
    ]
    assert "Learning rates on edits: LoRA 0.01, HiP-LoRA 0.5." in shown.note


def test_only_methods_with_factors_wait_for_them_and_all_their_runs_share_one_job(study):
    found, settings, _ = study
    needed = {job.name: set(job.needs.values()) for job in editing.jobs(found, settings)}
    factors = found.factors(found.row("hiplora"))
    assert {name for name, needs in needed.items() if needs == {factors}} == {
        run(found, settings, "hiplora", seed).name for seed in (42, 100)
    }
    assert all(not needs or needs == {factors} for needs in needed.values())


def test_all_jobs_are_read_and_none_else(study):
    found, settings, store = study
    jobs = set(editing.jobs(found, settings))
    assert all(store.finished(job) for job in jobs)
    assert len(jobs) == 3 * 2


def test_a_method_without_all_its_runs_has_no_row_and_its_jobs_are_named(study, tmp_path):
    found, settings, store = study
    lost = run(found, settings, "hiplora", 100)
    (store.path / "results" / f"{lost.key}.json").unlink()
    section = editing.section(found, settings, results(store))
    assert set(table(section, "editing-facts-batch")) == {"LoRA", "AlphaEdit"}
    assert section.missing == [lost.name]
    write_report(tmp_path / "report", "Made", {}, [section], {})


def test_the_text_says_what_took_what_changed_and_what_can_be_told(study, tmp_path):
    found, settings, store = study
    section = editing.section(found, settings, results(store))
    (text,) = section.text
    assert text.startswith("Facts, batch, edits that took: LoRA 62.5 %, HiP-LoRA 100.0 %, AlphaEdit 25.0 %.")
    assert "unrelated answers changed: LoRA 75.0 %" in text
    assert text.count("can be told from none if it is larger than about") == 2
    write_report(tmp_path / "report", "Made", {}, [section], {})


def test_without_any_result_everything_is_missing(tmp_path):
    found, store = made_study(tmp_path, *CHANGES)
    settings = found.recipe.protocols.editing
    section = editing.section(found, settings, results(store))
    assert section.measurements == []
    assert set(section.missing) == {job.name for job in editing.jobs(found, settings)}
    write_report(tmp_path / "report", "Nothing", {}, [section], {})
