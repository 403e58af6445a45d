"""No command replaces what it reads, or what its inputs name."""

import shutil

import peft
import pytest
from transformers import AutoModelForCausalLM

from hiplora.cli.common import inputs
from tests.commands import run
from tests.tiny import save_tiny, write_jsonl

COMMANDS = [
    ("train", "d/recipe.yaml", "--out", "d"),
    ("train", "--model", "base", "--data", "d/rows.jsonl", "--out", "d"),
    ("train", "--model", "base", "--data", "d/rows.jsonl", "--out", "base"),
    ("compare", "base", "d/rows.jsonl", "--out", "d"),
    ("compare", "base", "other.jsonl", "--drift-text", "d/text.txt", "--out", "d"),
    ("compare", "base", "other.jsonl", "--prompts", "d/text.txt", "--out", "d"),
    ("eval", "base", "--suite", "d/rows.jsonl", "--out", "d/rows.jsonl"),
    ("eval", "base", "--suite", "d/suite.yaml", "--out", "d/suite.yaml"),
    ("eval", "base", "--suite", "d/suite.yaml", "--out", "d/rows.jsonl"),
    ("export", "adapter", "--to", "dense", "--out", "base"),
    ("export", "adapter", "--to", "lora", "--tolerance", "1", "--data", "d/rows.jsonl", "--out", "d"),
    ("inspect", "adapter", "--html", "base/config.json"),
    ("merge", "adapter", "adapter", "--out", "new", "--html", "base/config.json"),
    ("merge", "adapter", "adapter", "--out", "adapter"),
    ("merge", "x/adapter", "adapter", "--out", "x/adapter"),
    ("merge", "adapter", "x/lr=1e-3", "--out", "x/lr=1e-3"),
    ("merge-check", "a=adapter", "b=adapter", "--suite", "d/suite.yaml", "--out", "d"),
    ("merge-check", "a=adapter", "b=adapter", "--suite", "d/suite.yaml", "--out", "base"),
    ("protect", "adapter", "--drift-text", "d/text.txt", "--out", "d"),
    ("edit", "base", "d/edits.json", "--out", "d"),
    ("probe", "base", "--out", "base"),
    ("init", "--data", "d/rows.jsonl", "--out", "d/rows.jsonl"),
    ("train", "--model", "smollm2-135m", "--data", "other.jsonl", "--out", "cache/models/smollm2-135m"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base model, an adapter, and data."""
    place = tmp_path_factory.mktemp("inputs")
    for folder in ("d", "cache/models/smollm2-135m"):
        (place / folder).mkdir(parents=True)
    save_tiny(place / "base")
    for name in ("d/rows.jsonl", "other.jsonl"):
        write_jsonl(place / name, [{"prompt": f"question {row}", "completion": "answer"} for row in range(20)])
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["up_proj"])).save_pretrained(place / "adapter")
    for name in ("adapter", "lr=1e-3"):
        shutil.copytree(place / "adapter", place / "x" / name)
    texts = {
        "d/text.txt": "text to measure on",
        "d/suite.yaml": "tasks: [rows.jsonl]",
        "d/recipe.yaml": "model: ../base\ndata: ../other.jsonl\n",
        "d/edits.json": '[{"prompt": "The capital is", "new": "here"}]',
    }
    for name, text in texts.items():
        (place / name).write_text(text)
    return place


def contents(folder):
    """Every file of a folder, by its name."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_overwrite_spares_every_input(command, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setenv("HIPLORA_CACHE", str(place / "cache"))
    before = contents(place)
    code, _, err = run(capsys, *command, "--overwrite")
    assert (code, "would delete" in err) == (2, True), err
    assert contents(place) == before


def test_what_is_no_input_is_no_obstacle(place, monkeypatch):
    monkeypatch.chdir(place)
    assert inputs({"method": "d", "recipe": "d", "data": "d", "out": "d", "model": "other.jsonl" * 99}) == {}
