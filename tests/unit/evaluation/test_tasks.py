"""Suites and the project's tasks: their names, where rows come from, and how answers are scored."""

import pytest

from hiplora.data.prompts import step_by_step
from hiplora.errors import ConfigError, DataError
from hiplora.evaluation.suite import own_suites, own_tasks, read_suite, task_samples
from hiplora.evaluation.tasks import rows, scoring


def names(suite):
    return [task.name for task in suite.tasks]


def test_the_projects_suites_name_its_tasks_whose_files_say_what_lm_eval_and_the_report_need():
    for suite in own_suites():
        assert all(task.lm_eval == f"hiplora_{task.name}" for task in read_suite(suite).tasks)
    for name, task in own_tasks().items():
        assert task["task"] == f"hiplora_{name}"
        assert {"title", "file", "score"} <= set(task["metadata"])
        assert task["metadata"]["score"] in [entry["metric"] for entry in task["metric_list"]]
        assert task["metadata"].get("reader", "same") in rows.READERS
        assert task_samples(name) == (10 if name == "humaneval_10" else 1)


def test_an_alternative_is_taken_by_the_file_that_is_there(tmp_path):
    for file, expected in (("openbookqa", "openbookqa"), ("scienceqa_test", "scienceqa")):
        (tmp_path / f"{file}.jsonl").write_text("{}\n")
        assert names(read_suite("scienceqa | openbookqa", tmp_path)) == [expected]
    assert names(read_suite("scienceqa | openbookqa")) == ["scienceqa"]


def test_tasks_and_files_of_rows_are_named_one_by_one_and_files_by_their_whole_names(tmp_path):
    (tmp_path / "other").mkdir()
    files = [tmp_path / name for name in ("med.dev.jsonl", "med.test.jsonl", "other/med.dev.jsonl")]
    for file in files:
        file.write_text('{"prompt": "a", "completion": "b"}\n')
    suite = read_suite(f"gsm8k, lambada_openai,{files[0]},{files[1]},gsm8k")
    assert [task.lm_eval for task in suite.tasks] == ["hiplora_gsm8k", "lambada_openai", "med.dev", "med.test"]
    with pytest.raises(ConfigError, match=r"two files are called med\.dev"):
        read_suite(f"{files[0]},{files[2]}")


def test_a_suite_file_limits_tasks_and_includes_folders(tmp_path):
    (tmp_path / "mine").mkdir()
    path = tmp_path / "mine.yaml"
    path.write_text("tasks: [gsm8k, {task: other, limit: 5}]\ninclude: [mine]\n")
    suite = read_suite(str(path))
    assert [(task.lm_eval, task.limit) for task in suite.tasks] == [("hiplora_gsm8k", None), ("other", 5)]
    assert suite.include == (tmp_path / "mine",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tasks: []", "tasks"),
        ("tasks: [{task: gsm8k, limit: 0}]", "limit"),
        ("task: gsm8k", "tasks"),
        ("tasks: [gsm8k]\ninclude: [nowhere]", "nowhere"),
        ("tasks: [gsm8k, {task: gsm8k, limit: 5}]", "gsm8k is listed twice"),
        ("tasks: [", "is not YAML"),
    ],
)
def test_a_wrong_suite_file_is_refused_by_what_is_wrong_in_it(tmp_path, text, said):
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_suite(str(tmp_path / "wrong.yaml"))


ARC = {"choices": {"text": ["a", "b"], "label": ["1", "2"]}}
TWO = {"choices": ["a", "b"]}
BOOL = {"passage": "P", "question": "q"}
SCIENCE = {"image": None, "question": "Q", "hint": "H", **TWO, "answer": 1}
SOCIAL = {"context": "C", "question": "Q", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"}
# One row of each hub data set, by the fields that the hub documents, and what becomes of it.
PUBLISHED = {
    "arc": ({"question": "Q", **ARC, "answerKey": "2"}, {"question": "Q", **TWO, "answer": 1}),
    "openbookqa": ({"question_stem": "Q", **ARC, "answerKey": "1"}, {"question": "Q", **TWO, "answer": 0}),
    "scienceqa": (SCIENCE, {"question": "H\nQ", **TWO, "answer": 1}),
    "hellaswag": (
        {"activity_label": "L", "ctx": "C", "endings": ["a", "b"], "label": "1"},
        {"context": "L: C", **TWO, "answer": 1},
    ),
    "piqa": ({"goal": "Q", "sol1": "a", "sol2": "b", "label": 1}, {"question": "Q", **TWO, "answer": 1}),
    "winogrande": (
        {"sentence": "S _ T", "option1": "a", "option2": "b", "answer": "2"},
        {"context": "S _ T", **TWO, "answer": 1},
    ),
    "boolq": ({**BOOL, "answer": True}, {**BOOL, "choices": ["no", "yes"], "answer": 1}),
    "social_iqa": (SOCIAL, {"context": "C", "question": "Q", "choices": ["a", "b", "c"], "answer": 2}),
    "lambada": ({"text": "one two three"}, {"context": "one two", "answer": "three"}),
    "same": ({"question": "Q", "answer": "#### 1"}, {"question": "Q", "answer": "#### 1"}),
}


@pytest.mark.parametrize("reader", sorted(rows.READERS))
def test_a_published_row_gets_the_fields_of_a_local_one(reader):
    published, local = PUBLISHED[reader]
    assert rows.READERS[reader](published) == local
    assert rows.READERS["scienceqa"]({**SCIENCE, "image": object()}) is None  # a question about a picture


@pytest.mark.parametrize(
    ("text", "said"), [(None, "has no piqa"), ("[1]\n", "line 1"), ("{broken\n", "line 1"), ("\n", "holds no rows")]
)
def test_a_folder_that_cannot_serve_is_refused(tmp_path, text, said):
    if text is not None:
        (tmp_path / "piqa.jsonl").write_text(text)
    with pytest.raises(DataError, match=said):
        rows.load("piqa", data=str(tmp_path))


def test_a_folder_and_a_hub_that_cannot_serve_are_both_named_and_a_package_comes_before_the_hub(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(DataError, match=rf"{tmp_path} has no mine, and owner/name.*no route to host.*--data"):
        rows.load("mine", hub="owner/name", data=str(tmp_path))
    programs = rows.load("humaneval", hub="openai/openai_humaneval", data=str(tmp_path))["test"]
    assert len(programs) == 164
    assert {"prompt", "canonical_solution", "test", "entry_point"} <= set(programs[0])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 + 3 = 5.\nThe answer is: 5", 5.0),
        ("The final answer is: $12.50!\n\nQuestion: next", 12.5),
        ("He pays 1200.\n#### 1200", 1200.0),
        ("The answer is: 1. No, wait. The answer is: 2", 2.0),
        ("The answer is: 50%", 50.0),
        ("The answer is: 20/35", 20 / 35),
        ("The answer is: 1/0", "1/0"),
        ("#### 1,200", "1,200"),
        ("The answer is: x + 1", "x + 1"),
        ("It is 5.", None),
        ("", None),
    ],
)
def test_the_answer_of_a_derivation_is_what_its_last_mark_announces(text, answer):
    assert scoring.stated_answer(text) == answer


@pytest.mark.parametrize(
    ("match", "text", "right"),
    [
        (scoring.number_match, "$1200.00", 1.0),
        (scoring.number_match, "1201", 0.0),
        (scoring.stated_match, "600 twice. The answer is: 1,200", 1.0),
        (scoring.stated_match, "The answer is: 6", 0.0),
        (scoring.stated_match, "1,200", 0.0),
    ],
)
def test_an_answer_to_gsm8k_is_right_if_it_is_what_follows_the_solutions_marks(match, text, right):
    row = {"question": "What?", "answer": "He pays 2 * 600 = <<2*600=1200>>1200.\n#### 1,200"}
    assert match(row, [text]) == {"exact_match": right}


@pytest.mark.parametrize("name", ["gsm8k_solution", "gsm8k_reference"])
def test_a_derivation_is_asked_for_as_in_training(name):
    assert own_tasks()[name]["doc_to_text"].replace("{{question}}", "1 + 1?") == step_by_step("1 + 1?")


def test_generated_programs_are_run_with_their_tests():
    row = {"prompt": "def add(a, b):\n", "test": "def check(f):\n    assert f(1, 2) == 3", "entry_point": "add"}
    assert scoring.humaneval(row, [["    return a + b\n"]]) == {"pass@1": 1.0}
    wrong = ["    return a\n", "    exit(0)\n", "    return\n", "", "    return 3\n"]
    assert scoring.humaneval(row, [wrong]) == {"pass@1": 0.2, "pass@5": 1.0}
    tests = {"test_setup_code": "", "test_list": '["assert f(2) == 4"]'}
    assert scoring.mbpp(tests, [["def f(x): return x * x"]]) == {"pass@1": 1.0}
    assert scoring.mbpp(tests, [["def f(x): return x"]]) == {"pass@1": 0.0}
