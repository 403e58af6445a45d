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

from hiplora.cli.train import command
from tests import commands
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


@pytest.fixture
def run(capsys):
    """Run `hiplora train`; return its exit status, output and errors."""
    return lambda *arguments: commands.run(capsys, "train", *arguments)


def test_the_example_of_the_help_trains(run, tmp_path, monkeypatch, tiny_model_dir):
    example = command.__doc__.rstrip().splitlines()[-1].strip()
    assert example.startswith("hiplora train ")
    arguments = shlex.split(example)[2:]
    small = [word for value in [*SMALL, f"model={tiny_model_dir}"] for word in ("--set", value)]
    arguments[arguments.index("--out") + 1] = str(tmp_path / "out")
    monkeypatch.chdir(ROOT)
    code, said, err = run(*arguments, *small)
    assert (code, "HiP-LoRA adapter in" in said) == (0, True), err
    assert (tmp_path / "out" / "adapter_config.json").exists()


def test_a_person_gets_the_cost_a_line_a_step_a_table_and_what_to_do_next_and_settings_reach_the_run(
    run, recipe_file, tmp_path
):
    code, said, err = run(recipe_file, "--set", "method=lora", "--set", "train.lr=3e-3")
    assert code == 0, err
    for part in ("steps", "training loss at the end", "trainable parameters", "tokens per second"):
        assert part in said
    cost, *steps = err.splitlines()
    assert re.match(r"8 rows, [\d,]+ tokens, 2 steps.*, about \d+ s", cost)
    assert [line.split()[1] for line in steps] == ["1/2", "2/2"]
    out = tmp_path / "own-out"  # the recipe's
    assert re.match(rf"next: hiplora generate \S+ --adapter {out} --prompt TEXT --raw ", said.splitlines()[-1])
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert "lr: 0.003" in (out / "recipe.yaml").read_text()
    assert run(recipe_file, "--set", "out=", "--json")[0] == 2


def test_without_a_recipe_the_options_are_the_recipe_and_the_defaults_are_a_users(
    run, recipe_file, tmp_path, tiny_model_dir, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    options = ["--model", tiny_model_dir, "--data", "rows.jsonl", "--method", "lora", "--lr", "1e-3", "--epochs", "2"]
    code, said, err = run(*options, "--out", "out", "--json")
    printed = json.loads(said)
    assert (code, printed["kind"], printed["out"]) == (0, "training", "out")
    assert printed["steps"] == 2  # two passes, one step of eight rows each
    assert "2 steps = 2.0 passes" in err
    assert set(printed["drift"]) == {"prose", "python code"}


def test_a_preview_shows_what_is_learned_and_trains_nothing(run, recipe_file, tmp_path):
    code, shown, _ = run(recipe_file, "--preview", "2", "--out", tmp_path / "out")
    assert code == 0
    assert shown.startswith(
        "row 1\n0+1=⟦1<|eos|>⟧\n\nrow 2\n1+1=⟦2<|eos|>⟧\n\n8 rows, 16 of 48 tokens are learned; 2 steps"
    )
    assert re.search(r"roughly \d+ s here", shown)
    assert not (tmp_path / "out").exists()
    printed = json.loads(run(recipe_file, "--dry-run", "--json")[1])
    assert (printed["kind"], printed["rows"], printed["steps"]) == ("preview", ["0+1=⟦1<|eos|>⟧"], 2)
    assert printed["seconds"] > 0


def test_the_recipe_that_init_writes_is_one_and_finds_what_it_was_given(
    run, recipe_file, tmp_path, tiny_model_dir, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("near model").symlink_to(tiny_model_dir)
    options = ("--model", "near model", "--data", "rows.jsonl", "--out", "own/mine.yaml")
    code, said, _ = commands.run(capsys, "init", *options)
    assert (code, "next: hiplora train own/mine.yaml" in said) == (0, True)
    assert "lr: 0.0002  # Peak learning rate" in Path("own/mine.yaml").read_text()
    assert run("own/mine.yaml", "--dry-run")[0] == 0


@pytest.mark.parametrize(("number", "said"), [(errno.ENOENT, "No such file"), (errno.ENOSPC, "make room and run")])
def test_only_a_full_disk_is_called_full(tmp_path, monkeypatch, number, said):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    train = importlib.import_module("hiplora.training.train")
    with pytest.raises(OSError, match=said), train._full_disk_explained(tmp_path):
        raise OSError(number, os.strerror(number))


def test_a_run_that_stopped_says_that_it_is_carried_on(run, recipe_file, tmp_path, caplog, monkeypatch):
    out = tmp_path / "out"

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(sys.modules["hiplora.training.train"], "model_card", stop)
        code, _, err = run(recipe_file, "--out", out)
    assert (code, "repeat the command (without --overwrite) to continue" in err) == (130, True)
    assert run(recipe_file, "--out", out)[0] == 0
    assert "carrying on from step 2 of 2" in caplog.text


def test_a_terminal_sees_a_bar_on_stderr(run, recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    code, said, err = run(recipe_file, "--out", tmp_path / "out")
    assert (code, "2/2" in err, "2/2" in said) == (0, True, False)
