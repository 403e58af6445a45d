"""`hiplora edit` on a tiny model: every method and mode leaves what it promises."""

import json

import pytest
from peft import PeftModel
from typer.testing import CliRunner

from hiplora.adapters import read_update
from hiplora.cli.main import app, main
from hiplora.editing import AdapterEditor
from hiplora.models import load
from tests.tiny import write_jsonl

FAST = ["--steps", "4", "--lr", "1e-2", "--locality", "5", "--limit", "4"]
ALPHA = [
    "--set",
    "calibration_tokens=300",
    "--set",
    "value_steps=3",
    "--set",
    "prefixes=1",
    "--locality",
    "5",
]
CALIBRATION = ["--set", "calibration_tokens=300", "--set", "r=4", "--set", "principal_rank=4"]


def run(*arguments):
    result = CliRunner().invoke(app, ["edit", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def failed(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(["edit", *map(str, arguments)])
    return stop.value.code, capsys.readouterr().err


def counterfact(path, count=4):
    return write_jsonl(
        path,
        [
            {
                "prompt": f"The colour of box {i} is",
                "subject": f"box {i}",
                "target_true": "red",
                "target_new": "blue",
                "relation": "P136",
                "paraphrase_prompts": [f"Box {i} has been painted"],
                "neighborhood_prompts": [f"The colour of crate {i} is"],
                "neighborhood_answers": ["red"],
            }
            for i in range(count)
        ],
    )


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", FAST),
        ("milora", [*FAST, "--set", "rank_pattern={k_proj: 3}"]),
        ("hiplora", FAST + CALIBRATION),
        ("alphaedit", [*ALPHA, "--limit", "4"]),
    ],
)
def test_a_batch_leaves_an_adapter_that_does_what_was_measured(tiny_model_dir, tmp_path, method, options):
    out = tmp_path / "out"
    said = json.loads(run(tiny_model_dir, "builtin", "--method", method, "--out", out, "--json", *options))
    record = json.loads((out / "edit.json").read_text())
    assert said["summary"] == record["summary"]
    assert record["adapters"] == ["adapter"]
    assert record["edits"]["count"] == 4
    assert record["provenance"]["seed"] == 42
    assert record["summary"]["locality"]["questions"] == 5
    read_update(out / "adapter")
    model, tokenizer = load(str(tiny_model_dir))
    adapted = PeftModel.from_pretrained(model, str(out / "adapter")).eval()
    from hiplora.editing import evaluate_edits, load_edits

    again = evaluate_edits(adapted, tokenizer, load_edits("builtin", 4).edits)
    measured = record["stages"][0]["records"]["log_prob_new"]
    assert again["log_prob_new"].tolist() == pytest.approx(measured, abs=1e-3)
    assert measured != pytest.approx(record["before"]["log_prob_new"], abs=1e-2)


def test_batches_apart_leave_an_adapter_each_and_a_sequence_one(tiny_model_dir, tmp_path):
    for mode, adapters in (("batch", ["adapter-001", "adapter-002"]), ("sequential", ["adapter"])):
        out = tmp_path / mode
        run(
            *(tiny_model_dir, "builtin", "--method", "lora", "--mode", mode, "--edits-per-batch", "2"),
            *("--out", out, *FAST),
        )
        record = json.loads((out / "edit.json").read_text())
        assert record["adapters"] == adapters
        assert {path.name for path in out.iterdir()} >= {*adapters, "edit.json", "report.html"}
        assert not (out / "stages").exists()
        assert len(record["stages"]) == 2


def test_single_edits_leave_the_record_alone_and_the_table_shows_all_that_was_measured(
    tiny_model_dir, tmp_path
):
    file = counterfact(tmp_path / "cf.jsonl")
    said = run(
        *(tiny_model_dir, file, "--method", "lora", "--mode", "single", "--out", tmp_path / "out"),
        *("--steps", "3", "--locality", "5"),
    )
    assert not list((tmp_path / "out").glob("adapter*"))
    for text in (
        "4 edits by lora, single",
        "questions near it kept",
        "unrelated questions",
        "Entity/Attribute",
    ):
        assert text in said
    assert str(tmp_path) not in (tmp_path / "out" / "edit.json").read_text().replace(str(tiny_model_dir), "")


def test_questions_about_edited_subjects_are_left_out(tiny_model_dir, tmp_path):
    from hiplora.editing import load_questions

    first = load_questions()[0]
    edit = {"set": "x", "category": "Relation/Fact", "old": "a", "new": "b", "subject": first.subject}
    file = write_jsonl(tmp_path / "own.jsonl", [{**edit, "prompt": "One", "paraphrase": "Two"}])
    run(
        *(tiny_model_dir, file, "--method", "lora", "--out", tmp_path / "out", "--steps", "1"),
        *("--locality", "3"),
    )
    asked = json.loads((tmp_path / "out" / "edit.json").read_text())["questions"]
    assert first.subject not in asked["subject"]
    assert len(asked["prompt"]) == 3


def test_an_interrupted_command_continues_after_the_last_finished_batch(
    tiny_model_dir, tmp_path, capsys, monkeypatch
):
    options = ("--method", "lora", "--edits-per-batch", "2", *FAST)
    run(tiny_model_dir, "builtin", "--out", tmp_path / "whole", *options)
    teach, taught = AdapterEditor.teach, []

    def stopped(self, edits):
        taught.append(len(edits))
        if len(taught) == 2:
            raise KeyboardInterrupt
        return teach(self, edits)

    monkeypatch.setattr(AdapterEditor, "teach", stopped)
    assert failed(capsys, tiny_model_dir, "builtin", "--out", tmp_path / "out", *options)[0] == 130
    code, message = failed(
        capsys, tiny_model_dir, "builtin", "--out", tmp_path / "out", *options, "--seed", "1"
    )
    assert (code, "settings.seed: 42 there, 1 here" in message) == (2, True)
    run(tiny_model_dir, "builtin", "--out", tmp_path / "out", *options)
    assert len(taught) == 3
    whole, again = (json.loads((tmp_path / name / "edit.json").read_text()) for name in ("whole", "out"))
    for name in ("summary", "stages", "questions", "adapters"):
        assert again[name] == whole[name]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "rome"], "method is 'rome'; expected one of adalora, corda, hiplora"),
        (["--method", "alphaedit", "--steps", "3"], "steps has no use with alphaedit"),
        (["--method", "alphaedit", "--set", "rank=3"], "--set rank: "),
        (["--method", "lora", "--set", "k=3"], "--set k: "),
        (["--set", "r"], "expected KEY=VALUE"),
        (["--mode", "single", "--edits-per-batch", "2", "--method", "lora"], "no use in the mode single"),
        (["--method", "lora", "--lr", "0"], "--lr: "),
        (["--method", "lora", "--set", "target_modules=[nope]", "--limit", "2"], "does not fit the model"),
        (["--limit", "100000"], "100000 are asked for"),
    ],
)
def test_wrong_usage_is_one_line_and_leaves_no_folder(tiny_model_dir, tmp_path, capsys, options, said):
    code, message = failed(
        capsys, tiny_model_dir, "builtin", "--out", tmp_path / "out", "--locality", "1", *options
    )
    assert code == 2
    assert said in message
    assert not (tmp_path / "out").exists()


def test_the_output_folder_must_be_new(tiny_model_dir, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("kept")
    code, message = failed(capsys, tiny_model_dir, "builtin", "--limit", "1", "--out", tmp_path)
    assert code == 2
    assert "exists already" in message
