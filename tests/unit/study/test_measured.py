"""What training rows and edits come to: counted in files that are there, assumed of those that are not."""

import json

import pytest

from hiplora.editing import load_edits
from hiplora.errors import DataError
from hiplora.models.shapes import model_shape
from hiplora.recipes.load_study import load_study
from hiplora.study.builder import Study
from hiplora.study.estimate import gpu
from hiplora.study.plan import plan
from hiplora.study.protocols import graph
from hiplora.study.steps.lengths import EDITS, OTHER_EDITS, OTHER_ROWS, ROWS
from hiplora.study.steps.loads import LOADS
from hiplora.study.steps.measured import data_of, edits_at, items_of

OWN = (
    "protocols={single_task: {methods: [lora]}}",
    "domains.mathematics.train={path: own.jsonl, held_out_fraction: 0.2}",
)


def write_rows(path, count, prompt=80, response=40):
    rows = [{"prompt": "a" * prompt, "completion": "b" * response} for _ in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)))


def test_rows_of_an_own_file_are_counted_and_their_tokens_told_by_characters(tmp_path):
    write_rows(tmp_path / "own.jsonl", 40)
    found = data_of({"path": "own.jsonl", "held_out_fraction": 0.25}, tmp_path)
    assert (found.rows, found.held_out, found.tokens) == (30, 10, 30)
    assert found.learned == pytest.approx(1 / 3)
    assert data_of({"path": "own.jsonl", "limit": 7}, tmp_path).rows == 7
    assert data_of({"path": "own.jsonl", "learn_prompt": True}, tmp_path).learned == 1


def test_a_file_that_changed_is_counted_again(tmp_path):
    for count in (5, 9):
        write_rows(tmp_path / "own.jsonl", count)
        assert data_of({"path": "own.jsonl"}, tmp_path).rows == count


def test_a_held_out_file_is_counted_too(tmp_path):
    write_rows(tmp_path / "own.jsonl", 5)
    write_rows(tmp_path / "other.jsonl", 8)
    block = {"path": "own.jsonl", "held_out": "other.jsonl"}
    assert data_of(block, tmp_path).held_out == 8
    assert data_of({**block, "held_out_limit": 3}, tmp_path).held_out == 3


def test_a_known_file_has_its_measured_lengths_and_as_many_rows_as_there_are(tmp_path):
    rows = [{"question": "How many?", "answer": "Three. #### 3"}] * 6
    (tmp_path / "gsm8k_train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    block = {"path": "gsm8k_train.jsonl", "template": "direct"}
    found = data_of(block, tmp_path)
    assert (found.rows, found.tokens, found.learned) == (6, 69.3, 0.062)
    assert data_of(block, None).rows == ROWS["gsm8k direct"].rows


def test_what_is_not_there_is_assumed(tmp_path):
    block = {"hub": "somebody/rows", "held_out_fraction": 0.1, "held_out_limit": 100}
    found = data_of(block, tmp_path)
    assert (found.rows, found.held_out, found.tokens) == (0.9 * OTHER_ROWS.rows, 100, OTHER_ROWS.tokens)


def test_epochs_over_an_own_file_are_steps_by_its_rows(tmp_path):
    write_rows(tmp_path / "own.jsonl", 40)
    recipe = {
        "data": {"path": "own.jsonl"},
        "method": {"name": "lora"},
        "train": {
            "epochs": 3,
            "batch_size": 4,
            "gradient_accumulation": 2,
            "packing": False,
            "max_length": 64,
        },
    }
    load = LOADS["train"]({"recipe": recipe}, model_shape("smollm2-135m"), tmp_path)
    assert load.train_tokens == 3 * 5 * 8 * 30


def test_a_file_that_cannot_be_used_is_refused_by_name(tmp_path):
    (tmp_path / "own.jsonl").write_text('{"colour": "red"}\n')
    with pytest.raises(DataError, match=r"own\.jsonl"):
        data_of({"path": "own.jsonl"}, tmp_path)


def test_own_edits_are_counted(tmp_path):
    edits = [
        {
            "set": "mine",
            "prompt": f"The capital of {name} is",
            "paraphrase": f"{name}'s capital is",
            "subject": name,
            "old": "Oslo",
            "new": "New Amsterdam",
            "category": "Relation/Fact",
        }
        for name in ("Norway", "Sweden", "Denmark")
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, edits)))
    found = edits_at("own.jsonl", tmp_path, None)
    assert (found.rows, found.near, found.written) == (3, 0, 7)
    assert found.answer == pytest.approx((13 + 4) / 2 / 4)
    assert edits_at("own.jsonl", tmp_path, 2).rows == 2
    assert edits_at("own.jsonl", None, None) == OTHER_EDITS
    with pytest.raises(DataError, match="has 3 edits, 4 are asked for"):
        edits_at("own.jsonl", tmp_path, 4)
    with pytest.raises(DataError, match="of the category Temporal/Numeric: has no edits"):
        edits_at("own.jsonl", tmp_path, None, "Temporal/Numeric")


def test_a_plan_names_what_it_assumes(tmp_path):
    def assumed():
        study = Study(load_study("pico", OWN), tmp_path)
        return plan(study, graph(study), {"gpu": gpu("h100")}, None)["assumed"]

    assert assumed() == ["own.jsonl"]
    write_rows(tmp_path / "own.jsonl", 5)
    assert assumed() == []


def test_items_of_a_task_are_those_of_its_file_else_of_the_hub(tmp_path):
    assert items_of("humaneval_10", tmp_path) == items_of("humaneval_10", None) == 164
    (tmp_path / "humaneval.jsonl").write_text('{"prompt": "a"}\n' * 7)
    assert items_of("humaneval_10", tmp_path) == 7
    assert items_of("a_task_of_lm_evals_own", tmp_path) is None


def test_edits_of_a_category_are_counted_among_the_built_in_ones_too():
    whole = load_edits("builtin").edits
    count = sum(edit.category == "Temporal/Numeric" for edit in whole)
    assert edits_at("builtin", None, None, "Temporal/Numeric").rows == count
    assert edits_at("builtin", None, None) == EDITS["builtin"]


def test_of_an_edits_file_no_more_is_read_than_a_job_does(tmp_path):
    """A row that no job comes to does not stop the plan."""
    good = {
        "prompt": "Mona was born in", "subject": "Mona", "target_true": "Oslo", "target_new": "Rome", "relation": "P19",
        "paraphrase_prompts": ["Mona's birthplace is"], "neighborhood_prompts": [], "neighborhood_answers": [],
    }  # fmt: skip
    rows = [good, {**good, "prompt": "Mona comes from", "relation": "P999999"}]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert edits_at("own.jsonl", tmp_path, 1).rows == 1
    with pytest.raises(DataError, match="P999999"):
        edits_at("own.jsonl", tmp_path, None)


def test_a_published_file_is_only_counted(tmp_path, monkeypatch):
    rows = [{"instruction": "Say it.", "output": "It."}] * 50
    (tmp_path / "alpaca.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr("hiplora.training.data.load_data", None)
    found = data_of({"path": "alpaca.jsonl", "held_out_fraction": 0.1, "held_out_limit": 3}, tmp_path)
    assert (found.rows, found.held_out) == (45, 3)
    assert data_of({"path": "alpaca.jsonl", "limit": 80}, tmp_path).rows == 50
