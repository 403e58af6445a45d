"""`hiplora edit` on a tiny model: every method and mode leaves what it promises."""

import html
import json
import re

import pytest
from peft import PeftModel

from hiplora.adapters import read_update
from hiplora.editing import evaluate_edits, load_edits, load_questions
from hiplora.editing.report import verdict
from hiplora.models import load
from tests.commands import run, succeed
from tests.tiny import write_jsonl
from tests.unit.editing.samples import COUNTERFACT

FAST = ["--steps", "4", "--lr", "1e-2"]
ALPHA = ["--set", "calibration_tokens=300", "--set", "value_steps=3", "--set", "prefixes=1"]
CALIBRATION = ["--set", "calibration_tokens=300", "--set", "r=4", "--set", "principal_rank=4"]
CRISP = ["--set", "calibration_tokens=300"]
SEQUENCE = ["--mode", "sequential", "--edits-per-batch", "2"]


@pytest.fixture
def edit(tiny_model_dir, tmp_path, capsys):
    """Run `hiplora edit`; return what it said, its record and the names of what it left."""

    def edited(edits, *options):
        said = succeed(capsys, "edit", tiny_model_dir, edits, "--out", tmp_path / "out", "--locality", "5", *options)
        left = {path.name for path in (tmp_path / "out").iterdir()} - {"edit.json", "settings.json", "report.html"}
        return said, json.loads((tmp_path / "out" / "edit.json").read_text()), left

    return edited


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", FAST),
        ("milora", [*FAST, "--set", "rank_pattern={k_proj: 3}"]),
        ("hiplora", FAST + CALIBRATION),
        ("alphaedit", [*ALPHA, *SEQUENCE]),
        ("crispedit", [*FAST, *CRISP, *SEQUENCE]),
    ],
)
def test_a_run_leaves_an_adapter_that_does_what_was_measured(tiny_model_dir, tmp_path, edit, method, options):
    said, record, left = edit("builtin", "--limit", "4", "--method", method, "--json", *options)
    shown = json.loads(said)
    assert [shown[key] for key in ("schema", "kind", "summary")] == [3, "edit", record["summary"]]
    assert left == set(record["adapters"]) == {"adapter"}
    assert (record["edits"], record["provenance"]["seed"]) == (4, 42)
    assert record["summary"]["locality"]["questions"] == 5
    folder = tmp_path / "out" / "adapter"
    read_update(folder)
    assert "[More Information Needed]" not in (folder / "README.md").read_text()
    model, tokenizer = load(str(tiny_model_dir))
    adapted = PeftModel.from_pretrained(model, str(folder)).eval()
    again = evaluate_edits(adapted, tokenizer, load_edits("builtin", 4))
    measured = record["stages"][-1]["records"]["log_prob_new"]
    assert again["log_prob_new"].tolist() == pytest.approx(measured, abs=1e-3)
    assert measured != pytest.approx(record["before"]["log_prob_new"], abs=1e-2)


def test_single_edits_of_a_sample_leave_the_record_alone(tmp_path, edit):
    rows = [{**COUNTERFACT, "prompt": f"The sea around Skye {i} is"} for i in range(4)]
    file = write_jsonl(tmp_path / "cf.jsonl", rows)
    said, record, left = edit(file, "--method", "lora", "--mode", "single", "--sample", "2", "--steps", "3")
    assert not left
    assert [len(stage["taught"]) for stage in record["stages"]] == [1, 1]
    assert "questions near it kept" in said


@pytest.mark.parametrize(
    ("mode", "options", "locality", "adapters"),
    [
        ("batch", ["--edits-per-batch", "2"], 4, {"adapter-001", "adapter-002"}),
        ("sequential", ["--edits-per-batch", "2"], 4, {"adapter"}),
        ("single", [], 0, set()),
    ],
)
def test_a_page_shows_every_edit_what_the_model_writes_and_what_else_moved(
    tmp_path, edit, mode, options, locality, adapters
):
    rows = [{"prompt": f"Box {n} is", "new": f"blue<{n}>", "old": "red"} for n in range(3)]
    rows[1]["paraphrase"] = "The second box is"
    command = ("--method", "lora", "--mode", mode, *options, "--locality", locality, *FAST)
    said, record, left = edit(write_jsonl(tmp_path / "rows.jsonl", rows), *command)
    assert left == set(record["adapters"]) == adapters
    page = html.unescape((tmp_path / "out" / "report.html").read_text())
    assert record["verdict"] in page
    assert record["verdict"] in said
    assert page.count("blue<") >= 6
    assert ("Not measured (--locality 0)." in page) == (locality == 0)
    for question in (record["questions"] or {}).get("prompt", ()):
        assert question in page


def test_the_verdict_says_whether_edits_work_and_what_else_moved():
    before = {"all": {"success": 25.0, "neighbours_kept": 80.0}}
    after = {"all": {"success": 75.0, "paraphrase_success": 50.0, "neighbours_kept": 90.0}}
    summary = {"before": before, "after": after}
    moved = {"questions": 20, "unchanged": 95.0, "accuracy_before": 60.0, "accuracy": 55.0}
    said = [verdict({"edits": 4, "summary": {**summary, "locality": locality}}) for locality in (None, moved)]
    assert [re.findall(r"\d+", text) for text in said] == [
        ["75", "4", "25", "50", "90", "80", "0"],
        ["75", "4", "25", "50", "90", "80", "20", "95", "60", "55"],
    ]


def test_questions_about_edited_subjects_are_left_out(tmp_path, edit):
    first = load_questions()[0]
    file = write_jsonl(tmp_path / "own.jsonl", [{"prompt": "One", "new": "b", "subject": first.subject}])
    asked = edit(file, "--method", "lora", "--steps", "1")[1]["questions"]["subject"]
    assert len(asked) == 5
    assert first.subject not in asked


@pytest.mark.parametrize("row", [{"new": "1" * 50_000}, {"new": "b", "paraphrase": "é" * 1100}, {"new": "b" * 2044}])
def test_an_edit_that_is_longer_than_the_context_is_refused(tiny_model_dir, tmp_path, capsys, row):
    file = write_jsonl(tmp_path / "own.jsonl", [{"prompt": "a", "new": "c"}, {"prompt": "One", **row}])
    code, _, err = run(capsys, "edit", tiny_model_dir, file, "--out", tmp_path / "out", "--method", "lora")
    assert code == 2
    assert re.search(r"the longest prompt, .* tokens, and the longest answer, .*; the model's context is 2048", err)
    assert not (tmp_path / "out").exists()
