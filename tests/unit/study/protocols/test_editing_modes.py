"""The section on editing for each way to edit and each kind of set, from results made by hand."""

import pytest

from hiplora.study.protocols import editing
from tests.unit.study.protocols.made import made_study, measured, results, table
from tests.unit.study.protocols.made_edits import CHANGES, edits, filled, questions, records, run


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


@pytest.mark.parametrize(("a_batch", "told"), [(2, True), (4, False)])
def test_batches_apart_from_each_other_are_said_to_be(tmp_path, a_batch, told):
    changes = (
        CHANGES[0],
        CHANGES[1].replace("modes: [batch]", f"modes: [batch], edits_per_batch: {a_batch}"),
    )
    made = {"lora": {seed: edits(records([0, 1, 2, 3], [1, 1, 1, 1])) for seed in (42, 100)}}
    found, settings, store = filled(tmp_path, made, *changes)
    notes = [one.note for one in editing.section(found, settings, results(store)).tables]
    assert any("Batches of 2, each on the bare model" in note for note in notes) == told


def test_neighbours_count_by_the_edits_that_have_some(tmp_path):
    made = {
        "lora": {
            seed: edits(records([0, 1, 2], [1, 1, 1], neighbours=[[1, 0], [], [1, 1]]), records([3], [1]))
            for seed in (42, 100)
        }
    }
    found, settings, store = filled(tmp_path, made)
    section = editing.section(found, settings, results(store))
    one = measured(section, "neighbours kept", "LoRA", setting={"set": "facts", "mode": "batch"})
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
    made = {"lora": {seed: edits(records([0, 1], [1, 0])) for seed in (42, 100)}}
    found, settings, store = filled(tmp_path, made, *changes)
    rows = table(editing.section(found, settings, results(store)), "editing-facts-batch")
    assert (rows["LoRA"]["Edit success"].value, rows["LoRA"]["Edit success"].paper) == (50, None)


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
