import pytest

from hiplora.errors import ConfigError
from hiplora.evaluation.suite import own_suites, own_tasks, read_suite, task_samples


def names(suite):
    return [task.name for task in suite.tasks]


@pytest.mark.parametrize("name", own_suites())
def test_every_suite_of_the_project_names_its_own_tasks(name):
    assert all(task.lm_eval == f"hiplora_{task.name}" for task in read_suite(name).tasks)


@pytest.mark.parametrize("name", own_tasks())
def test_every_task_file_says_what_lm_eval_and_the_report_need(name):
    task = own_tasks()[name]
    assert task["task"] == f"hiplora_{name}"
    assert {"title", "file", "score"} <= set(task["metadata"])
    assert task["metadata"]["score"] in [entry["metric"] for entry in task["metric_list"]]


def test_tasks_can_be_named_one_by_one():
    suite = read_suite("gsm8k, lambada_openai")
    assert [task.lm_eval for task in suite.tasks] == ["hiplora_gsm8k", "lambada_openai"]


def test_an_alternative_is_taken_by_the_file_that_is_there(tmp_path):
    (tmp_path / "openbookqa.jsonl").write_text("{}\n")
    assert names(read_suite("scienceqa | openbookqa", tmp_path)) == ["openbookqa"]
    (tmp_path / "scienceqa_test.jsonl").write_text("{}\n")
    assert names(read_suite("scienceqa | openbookqa", tmp_path)) == ["scienceqa"]
    assert names(read_suite("scienceqa | openbookqa")) == ["scienceqa"]


def test_files_of_rows_are_apart_by_their_whole_names(tmp_path):
    for name in ("med.dev.jsonl", "med.test.jsonl"):
        (tmp_path / name).write_text('{"prompt": "a", "completion": "b"}\n')
    suite = read_suite(",".join(str(tmp_path / name) for name in ("med.dev.jsonl", "med.test.jsonl")))
    assert [task.name for task in suite.tasks] == ["med.dev", "med.test"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "med.dev.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match=r"two files are called med\.dev"):
        read_suite(f"{tmp_path / 'med.dev.jsonl'},{tmp_path / 'other' / 'med.dev.jsonl'}")


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
        ("tasks: [", "is not YAML"),
    ],
)
def test_a_wrong_suite_file_is_refused_by_what_is_wrong_in_it(tmp_path, text, said):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_suite(str(path))


@pytest.mark.parametrize(
    ("name", "count"), [("humaneval", 1), ("humaneval_10", 10), ("gsm8k", 1), ("arc_of_lm_eval", 1)]
)
def test_the_number_of_samples_of_an_item_is_the_tasks(name, count):
    assert task_samples(name) == count
