"""The smallest study's data: the published sets' fields, right answers, nothing of the tests in the training rows."""

import json
import os
import subprocess
import sys

import pytest

from hiplora.data.texts import overlap
from hiplora.evaluation.tasks.scoring import humaneval, number_match
from hiplora.study import pico_words as words
from hiplora.study.pico_data import write_pico_data

# Rows and fields of each file; the fields are those of the published set of that name.
FILES = {
    "alpaca": (64, "input instruction output source"),
    "scienceqa_train": (64, "answer choices id question split"),
    "gsm8k_train": (64, "answer question"),
    "codealpaca": (64, "input instruction output source"),
    "mmlu_test": (16, "answer choices group question subject"),
    "scienceqa_test": (16, "answer choices id question split"),
    "gsm8k_test": (16, "answer question"),
    "humaneval": (16, "canonical_solution entry_point prompt task_id test"),
    "counterfact": (
        24,
        "id neighborhood_answers neighborhood_prompts paraphrase_prompts prompt relation relation_from subject "
        "target_new target_true",
    ),
    "wikitext2_raw_valid": (4, "index text title"),
    "wikitext2_raw_train_head": (4, "index text title"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    paths = write_pico_data(tmp_path_factory.mktemp("pico"))
    return {path.name.removesuffix(".jsonl"): read(path) for path in paths}


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_file_has_the_rows_and_fields_of_the_published_set(data):
    assert {name: len(rows) for name, rows in data.items()} == {name: n for name, (n, _) in FILES.items()}
    for name, (_, fields) in FILES.items():
        assert {" ".join(row) for row in data[name]} == {fields}, name


def test_several_processes_may_write_at_once_and_the_bytes_are_the_same_each_time(tmp_path):
    code = "import sys, pathlib; from hiplora.study.pico_data import write_pico_data as write\n"
    code += "for _ in range(20): write(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path / "shared")]
    writers = [
        subprocess.Popen(command, env={**os.environ, "PYTHONHASHSEED": seed}, stderr=subprocess.PIPE)
        for seed in ("1", "2")
    ]
    assert [(writer.communicate(timeout=60)[1], writer.returncode) for writer in writers] == [(b"", 0)] * 2
    alone = {path.name: path.read_bytes() for path in write_pico_data(tmp_path / "alone")}
    assert {path.name: path.read_bytes() for path in (tmp_path / "shared").iterdir()} == alone


def asked(row):
    """What a question is about, however it is worded or ordered."""
    return row["question"], tuple(sorted(row["choices"])) if "choices" in row else ()


def test_no_test_question_is_in_the_training_rows(data):
    kinds = {(row["instruction"], tuple(sorted(row["input"].split(", ")))) for row in data["alpaca"]}
    assert not kinds & set(map(asked, data["mmlu_test"]))
    for name in ("scienceqa", "gsm8k"):
        assert not set(map(asked, data[f"{name}_train"])) & set(map(asked, data[f"{name}_test"])), name
    code = " ".join(row["input"] + row["output"] for row in data["codealpaca"])
    assert not [row for row in data["humaneval"] if f"def {row['entry_point']}(" in code]


def test_the_answer_of_a_question_for_a_kind_is_the_one_word_of_that_kind(data):
    questions = [
        (row["question"], row["choices"], row["choices"][row["answer"]]) for row in data["mmlu_test"]
    ]
    questions += [(row["instruction"], row["input"].split(", "), row["output"]) for row in data["alpaca"]]
    for question, choices, answer in questions:
        _, _, group = words.KINDS[question.removeprefix("Which of these words names ").rstrip("?")]
        assert [word for word in choices if word in group] == [answer]


def test_the_answer_of_a_question_on_science_is_right(data):
    for row in data["scienceqa_train"] + data["scienceqa_test"]:
        answer = row["choices"][row["answer"]]
        if "alphabet" in row["question"]:
            assert answer == min(row["choices"])
        else:
            state = words.STATES[row["question"].removeprefix("Which of these is ").rstrip("?")]
            assert [word for word in row["choices"] if word in state] == [answer]


def test_the_answer_of_a_sum_follows_from_the_numbers_in_the_question(data):
    for row in data["gsm8k_train"] + data["gsm8k_test"]:
        first, second = (int(word.rstrip(".")) for word in row["question"].split() if word[0].isdigit())
        result = first + second if "buys" in row["question"] else first - second
        assert number_match(row, [f" {result}"]) == {"exact_match": 1.0}


def test_a_function_passes_its_own_tests_and_no_other_functions_solution_does(data):
    rows = data["humaneval"]
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        assert humaneval(row, [[row["canonical_solution"]]]) == {"pass@1": 1.0}
        assert humaneval(row, [[other["canonical_solution"]]]) == {"pass@1": 0.0}


def test_every_function_to_write_is_valid_python(data):
    for row in data["codealpaca"]:
        compile(row["input"] + row["output"], "row", "exec")


def test_an_edit_changes_its_own_subject_and_has_neighbours_that_no_edit_touches(data):
    edited = {row["prompt"] for row in data["counterfact"]}
    assert len(edited) == len(data["counterfact"])
    for row in data["counterfact"]:
        assert row["target_new"] != row["target_true"]
        assert row["subject"] in row["prompt"]
        assert all(row["subject"] in text and text != row["prompt"] for text in row["paraphrase_prompts"])
        assert len(row["neighborhood_prompts"]) == len(row["neighborhood_answers"]) == 3
        assert not edited & set(row["neighborhood_prompts"])
        assert set(row["neighborhood_answers"]) == {row["target_true"]}


def test_the_true_answers_are_those_of_the_list_of_facts(data):
    truth = {
        prompt.format(subject=subject): answers[place % len(answers)]
        for _, prompt, _, subjects, answers in words.FACTS
        for place, subject in enumerate(subjects)
    }
    for row in data["counterfact"]:
        assert truth[row["prompt"]] == row["target_true"]
        assert [truth[prompt] for prompt in row["neighborhood_prompts"]] == row["neighborhood_answers"]


def test_the_text_for_drift_and_the_one_for_calibration_are_long_enough_and_differ(data):
    drift, calibration = (
        "".join(row["text"] for row in data[f"wikitext2_raw_{part}"]) for part in ("valid", "train_head")
    )
    assert min(len(drift), len(calibration)) > 5000
    assert overlap({"drift": drift}, [calibration])["drift"] == 0
