"""`hiplora train` as typed: its own example, the output for people and for machines, exit statuses."""

import errno
import importlib
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hiplora.cli import main as frame
from hiplora.cli.train import command
from tests.commands import run as command_run
from tests.tiny import write_jsonl

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["train.steps=2", "train.max_length=200", "method.principal_rank=8", "method.preset=paper"]


@pytest.fixture
def recipe_file(tmp_path, tiny_model_dir):
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(8)])
    recipe = {
        "model": str(tiny_model_dir),
        "data": "rows.jsonl",
        "method": {"name": "hiplora", "preset": "paper", "principal_rank": 8},
        "train": {"steps": 2, "batch_size": 2, "gradient_accumulation": 1, "max_length": 32},
        "out": "own-out",
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    return tmp_path / "recipe.yaml"


def run(*arguments):
    """Run a command, by its exit status."""
    try:
        frame.main(["train", *map(str, arguments)])
    except SystemExit as stop:
        return stop.code or 0
    return 0


def test_the_example_of_the_help_trains(tmp_path, monkeypatch, tiny_model_dir, capsys):
    example = command.__doc__.rstrip().splitlines()[-1].strip()
    assert example.startswith("hiplora train ")
    arguments = shlex.split(example)[2:]
    small = [word for value in [*SMALL, f"model={tiny_model_dir}"] for word in ("--set", value)]
    arguments[arguments.index("--out") + 1] = str(tmp_path / "out")
    monkeypatch.chdir(ROOT)
    assert run(*arguments, *small) == 0
    assert (tmp_path / "out" / "adapter_config.json").exists()
    assert "HiP-LoRA adapter in" in capsys.readouterr().out


def test_a_person_gets_the_cost_a_line_a_step_a_table_and_what_to_do_next(recipe_file, tmp_path, capsys):
    assert run(recipe_file, "--out", tmp_path / "out") == 0
    captured = capsys.readouterr()
    for part in ("steps", "training loss at the end", "trainable parameters", "tokens per second", "hiplora export"):
        assert part in captured.out
    cost, *steps = captured.err.splitlines()
    assert re.match(r"8 rows, [\d,]+ tokens, 2 steps.*, about \d+ s", cost)
    assert [line.split()[1] for line in steps] == ["1/2", "2/2"]


def test_without_a_recipe_the_options_are_the_recipe_and_the_defaults_are_a_users(
    recipe_file, tmp_path, tiny_model_dir, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    options = ["--model", tiny_model_dir, "--data", "rows.jsonl", "--method", "lora", "--lr", "1e-3", "--epochs", "2"]
    assert run(*options, "--out", "out", "--json") == 0
    captured = capsys.readouterr()
    printed = json.loads(captured.out)
    assert (printed["kind"], printed["out"]) == ("training", "out")
    assert printed["steps"] == 2  # two passes, one step of eight rows each
    assert "2 steps = 2.0 passes" in captured.err
    assert set(printed["drift"]) == {"prose", "python code"}
    assert run("--data", "rows.jsonl", "--out", "other") == 2
    assert "give --model and --data" in capsys.readouterr().err


def test_a_preview_shows_what_is_learned_and_trains_nothing(recipe_file, tmp_path, capsys):
    assert run(recipe_file, "--preview", "2", "--out", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert shown.startswith(
        "row 1\n0+1=⟦1<|eos|>⟧\n\nrow 2\n1+1=⟦2<|eos|>⟧\n\n8 rows, 16 of 48 tokens are learned; 2 steps"
    )
    assert re.search(r"roughly \d+ s here", shown)
    assert not (tmp_path / "out").exists()
    assert run(recipe_file, "--dry-run", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["kind"], printed["rows"], printed["steps"]) == ("preview", ["0+1=⟦1<|eos|>⟧"], 2)
    assert printed["seconds"] > 0
    assert run(recipe_file, "--preview", "-1") == 2


def test_the_recipe_that_init_writes_is_one_and_finds_what_it_was_given(tmp_path, tiny_model_dir, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("near model").symlink_to(tiny_model_dir)
    rows = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(8)]
    write_jsonl("rows.jsonl", rows)
    code, said, _ = command_run(
        capsys, "init", "--model", "near model", "--data", "rows.jsonl", "--out", "own/mine.yaml"
    )
    assert (code, "next: hiplora train own/mine.yaml" in said) == (0, True)
    assert "lr: 0.0002  # Peak learning rate" in Path("own/mine.yaml").read_text()
    assert run("own/mine.yaml", "--dry-run") == 0


def test_settings_on_the_command_line_reach_the_run_and_the_recipes_out_is_the_default(recipe_file, tmp_path, capsys):
    assert run(recipe_file, "--set", "method=lora", "--set", "train.lr=3e-3") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.match(rf"next: hiplora generate \S+ --adapter {tmp_path / 'own-out'} --prompt", last)
    config = json.loads((tmp_path / "own-out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert "lr: 0.003" in (tmp_path / "own-out" / "recipe.yaml").read_text()
    assert run(recipe_file, "--set", "out=", "--json") == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "train.lrr=1"], r"train\.lrr: unknown field; did you mean `lr`"),
        (["--set", "data.path=gone.jsonl"], r"gone\.jsonl: no such file"),
        (["--resume", "--overwrite"], "pass one of them"),
        (["--set", "method.target_modules=[nope]"], r"check method\.target_modules"),
        (["--set", "train.batch_size=1000000000000000000000"], r"train\.batch_size: should be less than"),
        (["--dry-run", "--set", "method.r=60"], "principal_rank 8 and r 60 do not fit|r 60 exceeds"),
    ],
)
def test_a_users_mistake_is_exit_2_and_a_message_without_traceback(recipe_file, tmp_path, capsys, arguments, said):
    assert run(recipe_file, "--out", tmp_path / "out", *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert re.search(said, captured.err)
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(("number", "said"), [(errno.ENOENT, "No such file"), (errno.ENOSPC, "make room and run")])
def test_only_a_full_disk_is_called_full(tmp_path, monkeypatch, number, said):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    train = importlib.import_module("hiplora.training.train")
    with pytest.raises(OSError, match=said), train._full_disk_explained(tmp_path):
        raise OSError(number, os.strerror(number))


def test_a_run_that_stopped_says_that_it_is_carried_on(recipe_file, tmp_path, capsys, caplog, monkeypatch):
    out = tmp_path / "out"

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(sys.modules["hiplora.training.train"], "model_card", stop)
        assert run(recipe_file, "--out", out) == 130
    assert "repeat the command to carry on" in capsys.readouterr().err
    assert run(recipe_file, "--out", out) == 0
    assert "carrying on from step 2 of 2" in caplog.text


def test_a_terminal_sees_a_bar_on_stderr(recipe_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    assert run(recipe_file, "--out", tmp_path / "out") == 0
    captured = capsys.readouterr()
    assert "2/2" in captured.err
    assert "2/2" not in captured.out
