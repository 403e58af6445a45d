"""The last line of a command is the command that does what comes next, and it works as it stands."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import transformers
from peft import LoraConfig, get_peft_model

from hiplora.cli.common import next_step
from hiplora.models import model_dir
from hiplora.tuner import default_targets
from tests.commands import succeed
from tests.models.zoo import CASE
from tests.tiny import save_with_tokenizer, write_jsonl

BOTH_RULES = ("--method", "addition", "--method", "ties", "--set", "density=0.5")
SHORT = ("--steps", "2", "--max-length", "64", "--out", "out")


@pytest.fixture
def place(adapters, tiny_model_dir, tmp_path, monkeypatch):
    """A working directory with adapters, their base model and rows; one of the names has a space."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HIPLORA_CACHE", str(tmp_path / "cache"))
    shutil.copytree(adapters["one"], "my one")
    shutil.copytree(adapters["lora"], "lora")
    shutil.copytree(adapters["proj"], "closed")
    shutil.copytree(tiny_model_dir, "base")
    rows = [{"question": f"What is {i}?", "choices": ["red", "blue"], "answer": i % 2} for i in range(4)]
    write_jsonl(tmp_path / "items.jsonl", rows)
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"What is {i}?", "completion": f" It is {i}."} for i in range(4)])
    return tmp_path


@pytest.mark.parametrize(
    ("command", "follows"),
    [
        (["export", "my one", "--to", "lora", "--out", "out"], "generate"),
        (["export", "my one", "--to", "dense", "--out", "out"], "generate"),
        (["merge", "my one", "lora", "--out", "out", "--no-drift"], "generate"),
        (["merge", "my one", "lora", "--out", "out", "--method", "ties", "--no-drift"], "generate"),
        (["merge-check", "my one", "lora", "--suite", "items.jsonl", "--out", "out", "--weights", "1,0.5"], "merge"),
        (["merge-check", "my one", "lora", "--suite", "items.jsonl", "--out", "out", *BOTH_RULES], "merge"),
        (["inspect", "my one"], "protect"),
        (["inspect", "closed"], "drift"),
        (["protect", "my one", "--out", "out", "--tokens", "200"], "generate"),
        (["calibrate", "base", "--tokens", "200", "--rank", "energy:0.5"], "train"),
        (["calibrate", "base", "--tokens", "200", "--rank", "4", "--target-modules", r"[\w.]+q_proj"], "train"),
        (["factorize", "base", "--rank", "4", "--target-modules", "q_proj,v_proj"], "train"),
        (["probe", "base", "--layers", "0", "--directions", "2", "--tokens", "32", "--out", "out"], "factorize"),
        (["tune", "rows.jsonl", "--model", "base", "--rates", "1e-3", "--max-drift", "9", *SHORT], "train"),
        (["compare", "base", "rows.jsonl", "--methods", "hiplora", *SHORT], "export train"),
    ],
    ids=lambda value: " ".join(value[:4]) if isinstance(value, list) else value,
)
def test_a_command_ends_with_the_next_one(place, capsys, command, follows):
    said = succeed(capsys, *command)
    printed = [shlex.split(words) for words in re.findall(r"^[\w ]+: +hiplora (.*?)(?:   \(.*)?$", said, re.MULTILINE)]
    assert [words[0] for words in printed] == follows.split()
    for words in printed:
        succeed(capsys, *words, *(["--dry-run"] if words[0] == "train" else []))


@pytest.mark.parametrize(
    ("name", "servers", "follow"), [("BERT", [], ["inspect", "export"]), ("GPT-2", ["vllm"], ["generate", "protect"])]
)
def test_the_next_command_and_the_cards_servers_are_for_the_kind_of_model(name, servers, follow, tmp_path, capsys):
    case = CASE[name]
    base, adapter, out = (str(tmp_path / part) for part in ("base", "adapter", "out"))
    save_with_tokenizer(case.make(), base)
    model = getattr(transformers, case.auto).from_pretrained(base)
    config = LoraConfig(r=2, target_modules=default_targets(model), init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(adapter)
    commands = (["export", adapter, "--to", "lora", "--out", out], ["inspect", adapter])
    assert [succeed(capsys, *command).splitlines()[-1].split()[2] for command in commands] == follow
    card = Path(out, "README.md").read_text(encoding="utf-8")
    assert [word for word in ("vllm", "llama-server") if f"\n{word}" in card] == servers


def test_a_model_that_needs_no_hub_is_called_by_its_name():
    assert next_step("hiplora", "chat", model_dir("smollm2-135m")) == "next: hiplora chat smollm2-135m"
