import pytest

from hiplora.errors import DataError
from hiplora.reporting.merge_results import read_merge_report
from hiplora.reporting.merge_summary import (
    MEASURED,
    UNRELATED,
    WORST_COLUMNS,
    conflict_table,
    task_rows,
    tiles,
    verdict,
)
from tests.unit.reporting import merge_samples as samples


def read(names=("medicine", "law", "code"), totals=None, **changes):
    raw = samples.merge_report(names, layers=2, **changes)
    raw["totals"] |= totals or {}
    return read_merge_report(raw)


def plain(text):
    return text.replace("\u00a0", " ")


def test_the_terminal_table_has_the_worst_pair_of_each_module():
    raw = samples.merge_report(("medicine", "law"), layers=1, types=("q_proj",))
    row = raw["modules"][0]
    row["pairs"] = [samples.pair((0, 1), 0.25, 0.16, -0.5)]
    row |= {"score": 0.15, "sign_conflict": 0.31, "norm_ratio": 0.704}
    title, columns, rows = conflict_table(raw)
    assert title == "Most conflicting modules (1 of 1)"
    assert columns == WORST_COLUMNS
    assert [plain(cell) for cell in rows[0]] == [
        "model.layers.0.q_proj", "medicine × law", "0.15", "25 %", "16 %", "−0.50", "31 %", "0.70"
    ]  # fmt: skip


def test_without_conflicts_the_terminal_table_says_why():
    title, _, rows = conflict_table(samples.merge_report(("medicine",)))
    assert title == "One adapter alone: there is nothing that it could conflict with."
    assert rows == []
    with pytest.raises(DataError):
        conflict_table({"schema": 1, "kind": "merge"})


@pytest.mark.parametrize(
    ("totals", "headline"),
    [
        ({"left": 0.03, "right": 0.05}, "hardly meet"),
        ({"left": 0.03, "right": 0.2}, "read from some of the same directions, but write to others"),
        ({"left": 0.2, "right": 0.05}, "write to some of the same directions, but read from others"),
        ({"cosine": 0.2}, "and mostly agree there"),
        ({"cosine": -0.2}, "and work against each other there"),
        ({"cosine": 0.05}, "and neither agree nor disagree there"),
        ({"left": None}, "no module is changed by two of them"),
    ],
)
def test_the_headline_says_whether_the_adapters_meet_and_agree(totals, headline):
    assert headline in verdict(read(totals=totals)).headline


def test_the_sentences_carry_the_numbers():
    said = " ".join(verdict(read(("medicine", "law"))).sentences)
    assert "They share 25 % of the directions that they write to and 20 %" in plain(said)
    assert "unrelated ones would share 2.8 % and 2.8 %" in plain(said)
    assert "medicine × law, score" in said
    assert verdict(read()).sentences[0].startswith("Two of them share")


@pytest.mark.parametrize(
    ("changes", "headline"),
    [
        ({}, "The mean drop after the merge is 5.8 points (3.9 to 7.7); the drop is clear in 1 of 2 scores."),
        ({"tasks": {}}, "The mean drop after the merge is 5.8 points (3.9 to 7.7)."),
        ({"mean_drop": None}, "After the merge, the drop is clear in 1 of 2 scores."),
        ({"mean_drop": {"estimate": 5.8}, "tasks": {}}, "The mean drop after the merge is 5.8 points."),
    ],
)
def test_what_the_merge_cost_comes_first_where_it_was_measured(changes, headline):
    found = verdict(read(evaluation=samples.evaluation(**changes)))
    assert found.headline == headline
    assert "write to and read from" in found.sentences[0]


def test_tasks_show_before_after_and_the_change_with_its_interval():
    evaluation = samples.evaluation()
    evaluation["tasks"]["HumanEval"] = {"before": 12.0, "after": None}
    rows = task_rows(read(evaluation=evaluation).evaluation.tasks)
    assert rows[0] == ("GSM8K", "exact match", "41.2", "30.0", "−11.2", "−15.1 … −7.3")
    assert rows[1][-1] == "−1.1 … +0.5"
    assert rows[2] == ("HumanEval", "—", "12.0", "—", "—", "—")


def test_tiles_stand_beside_what_unrelated_updates_would_give():
    found = {tile.title: tile for tile in tiles(read())}
    assert list(found) == ["Shared outputs", "Shared inputs", "Norm of the sum", "Sign conflict"]
    assert plain(found["Shared outputs"].texts[MEASURED]) == "25 %"
    assert plain(found["Sign conflict"].texts[UNRELATED]) == "42 %"
    assert tiles(read(("medicine",))) == []
