"""The section on editing from results made by hand."""

import pytest

from hiplora.reporting.study.write import write_report
from hiplora.study.protocols import editing
from hiplora.study.protocols.editing_tables import _of_paper
from hiplora.study.statistics import spread
from tests.unit.study.protocols.made import made_study, measured, results, table
from tests.unit.study.protocols.made_edits import CATEGORIES, CHANGES, edits, filled, questions, records, run

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
    lost = told(section, "lost log-probability ratio", "HiP-LoRA", over="LoRA")
    assert lost.value == pytest.approx(0.5 / 1.5)
    assert told(section, "lost accuracy ratio", "HiP-LoRA", over="LoRA").value == pytest.approx(0)


def test_a_ratio_to_a_method_that_may_have_changed_nothing_has_no_interval(study):
    found, settings, store = study
    section = editing.section(found, settings, results(store))
    assert told(section, "locality damage ratio", "AlphaEdit", over="LoRA").high == 0
    over = told(section, "locality damage ratio", "AlphaEdit", over="HiP-LoRA")  # of one question in two
    assert (over.value, over.low, over.high) == (0, None, None)


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


def test_a_set_of_one_category_asks_for_it_and_shows_no_value_of_the_paper(tmp_path):
    sets = "sets: {whole: {limit: 4}, part: {limit: 4, category: Temporal/Numeric}}"
    found, _ = made_study(tmp_path, f"protocols={{editing: {{methods: [lora], {sets}, seeds: [42]}}}}")
    settings = found.recipe.protocols.editing
    asked = {job.name.split()[1]: job.settings for job in editing.jobs(found, settings)}
    assert asked["part"]["category"] == "Temporal/Numeric"
    assert "category" not in asked["whole"]  # its key is as before
    assert _of_paper(settings, "whole", "batch")
    assert not _of_paper(settings, "part", "batch")
