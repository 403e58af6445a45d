"""What a merge breaks: `hiplora merge-check`, and the report of `hiplora merge`."""

import json

import peft
import pytest
from typer.testing import CliRunner

from hiplora.cli.main import app
from hiplora.evaluation.evaluate import Partial
from tests.tiny import save_tiny, tiny_llama, write_jsonl

WORDS = ["rain", "stone", "river", "lamp", "cloud", "bread", "north", "seven"]


def row(i, shift):
    question = f"Which of these goes with {WORDS[(i + shift) % 8]}?"
    return {"question": question, "choices": [WORDS[(i + j) % 8] for j in range(4)], "answer": i % 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merges")
    base = save_tiny(folder / "base")
    (folder / "data").mkdir()
    for name, count in (("mmlu_test", 12), ("scienceqa_test", 10), ("arc_easy", 8)):
        write_jsonl(folder / "data" / f"{name}.jsonl", [row(i, count) for i in range(count)])
    for seed in (1, 2, 3):
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], base_model_name_or_path=str(base))
        model = tiny_llama()
        model.name_or_path = str(base)
        model = peft.get_peft_model(model, config)
        for index, parameter in enumerate(model.parameters()):
            if parameter.requires_grad:
                parameter.data.copy_(0.3 * seed * ((parameter.data * 997 + index).sin()))
        model.save_pretrained(folder / f"adapter{seed}")
    return folder


def owned(place):
    return [f"mmlu={place / 'adapter1'}", f"scienceqa={place / 'adapter2'}"]


def run(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


@pytest.fixture(scope="module")
def checked(place):
    out = place / "check"
    run("merge-check", *owned(place), f"arc_easy={place / 'adapter3'}", "--suite", "mmlu,scienceqa,arc_easy",
        "--data", place / "data", "--method", "addition", "--method", "ties", "--sizes", "2", "--out", out)  # fmt: skip
    return out, json.loads((out / "merge-check.json").read_text())


def estimate(record, name, task, form="likelihood"):
    return record["runs"][name][task][form]["estimate"]


def test_each_task_is_judged_against_the_adapter_that_was_trained_for_it(checked):
    _, record = checked
    for method in ("addition", "ties"):
        judged = record["verdicts"][method]["likelihood"]
        assert list(judged["tasks"]) == ["mmlu", "scienceqa", "arc_easy"]
        for task, row in judged["tasks"].items():
            assert row["before_of"] == task
            assert row["before"] == estimate(record, task, task)
            assert row["after"] == estimate(record, method, task)
            assert row["difference"]["estimate"] == pytest.approx(row["after"] - row["before"])
            assert row["difference"]["low"] <= row["difference"]["estimate"] <= row["difference"]["high"]


def test_merge_fail_counts_the_merges_of_every_size(checked):
    """All three, and the three pairs, which are scored on their tasks only; counted again here from the means."""
    _, record = checked
    assert set(record["runs"]["addition: mmlu + arc_easy"]) == {"mmlu", "arc_easy"}
    assert estimate(record, "addition", "mmlu") != estimate(record, "ties", "mmlu")
    judged = record["verdicts"]["addition"]["likelihood"]
    assert judged["instances"] == 4
    groups = {"addition": ["mmlu", "scienceqa", "arc_easy"]}
    for name in record["runs"]:
        if name.startswith("addition: "):
            groups[name] = name.removeprefix("addition: ").split(" + ")
    assert len(groups) == 4
    for tau, row in judged["merge_fail"].items():
        failed = [
            any(estimate(record, name, task) < float(tau) * estimate(record, task, task) for task in tasks)
            for name, tasks in groups.items()
        ]
        assert row["estimate"] == sum(failed) / 4
        assert row["low"] <= row["estimate"] <= row["high"]


def test_the_page_judges_every_rule(checked):
    out, _ = checked
    assert sorted(path.name for path in out.iterdir()) == ["merge-check.json", "report.html"]
    page = (out / "report.html").read_text()
    assert all(word in page for word in ("MMLU", "addition", "ties", "MergeFail", "tasks that its adapters were for"))


def test_a_task_without_an_owner_belongs_to_the_best_adapter_and_else_to_the_base(place, tmp_path):
    adapters = (place / "adapter1", place / "adapter2")
    said = run("merge-check", *adapters, "--suite", "mmlu", "--data", place / "data", "--out", tmp_path / "best")
    record = json.loads((tmp_path / "best" / "merge-check.json").read_text())
    row = record["verdicts"]["addition"]["likelihood"]["tasks"]["mmlu"]
    assert row["before"] == max(estimate(record, name, "mmlu") for name in ("adapter1", "adapter2"))
    assert "best at it" in said
    run("merge-check", *owned(place), "--suite", "mmlu,scienceqa,arc_easy", "--data", place / "data", "--limit", "4",
        "--out", tmp_path / "check")  # fmt: skip
    record = json.loads((tmp_path / "check" / "merge-check.json").read_text())
    judged = record["verdicts"]["addition"]["score"]
    assert list(judged["tasks"]) == ["mmlu", "scienceqa"]
    assert judged["kept"]["arc_easy"]["before_of"] == "base"


def test_a_name_that_is_no_task_is_reported_where_others_are(place, tmp_path, caplog):
    adapters = [f"mmlu={place / 'adapter1'}", f"scienc={place / 'adapter2'}"]
    run("merge-check", *adapters, "--suite", "mmlu,scienceqa", "--data", place / "data", "--limit", "4",
        "--out", tmp_path / "check")  # fmt: skip
    assert "adapter scienc: no task of the suite has this name (mmlu, scienceqa)" in caplog.text


def test_a_check_that_goes_on_from_one_by_other_rules_has_its_own_rules_only(place, tmp_path, monkeypatch):
    command = (*owned(place), "--suite", "mmlu,scienceqa", "--data", place / "data", "--limit", "4")
    with monkeypatch.context() as patch:
        patch.setattr(Partial, "remove", lambda store: None)
        run("merge-check", *command, "--method", "ties", "--out", tmp_path / "check")
    run("merge-check", *command, "--out", tmp_path / "check", "--overwrite")
    record = json.loads((tmp_path / "check" / "merge-check.json").read_text())
    assert list(record["runs"]) == ["base", "mmlu", "scienceqa", "addition"]


def test_a_merge_comes_with_its_report(place, tmp_path):
    out, page = tmp_path / "merged", tmp_path / "page.html"
    said = run("merge", place / "adapter1", place / "adapter2", "--out", out, "--html", page)
    report = json.loads((out / "merge-report.json").read_text())
    assert len(report["modules"]) == 4
    assert [adapter["name"] for adapter in report["adapters"]] == ["adapter1", "adapter2"]
    assert all(len(adapter["sha256"]) == 64 for adapter in report["adapters"])
    assert report["most_conflicting"][0] in said
    drift = report["merge"]["drift"]
    assert drift["drift"].keys() == {"adapter1", "adapter2", "merge"}
    assert "added up" in drift["verdict"]
    assert drift["verdict"][:40] in said
    assert page.read_text().lower().startswith("<!doctype html>")
