"""`hiplora generate`, `chat` and `drift` on a tiny model."""

import io
import json
import re

import peft
import pytest
import torch

from hiplora.evaluation import BaseReference, measure_drift
from hiplora.evaluation.answers import chat_prompt, continuations
from hiplora.evaluation.mounting import load_model, mounted
from tests.commands import succeed
from tests.tiny import tiny_llama, write_jsonl

ADAPTED = ("--adapter", "{adapter}")


@pytest.fixture
def adapter(tmp_path):
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    peft.get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


@pytest.fixture
def command(tiny_model_dir, adapter, capsys):
    """Run a command on the model with the adapter; return what it said."""
    return lambda name, *options: succeed(capsys, name, tiny_model_dir, "--adapter", adapter, *options)


def test_answers_are_those_of_each_model_with_the_differences_marked(tiny_model_dir, command, adapter):
    options = ("generate", "--prompt", "Why?", "--tokens", 8)
    record = json.loads(command(*options, "--json"))
    assert (record["schema"], record["kind"]) == (1, "answers")
    (row,) = record["prompts"]
    model, tokenizer = load_model(str(tiny_model_dir))
    prompt = chat_prompt(tokenizer, [{"role": "user", "content": "Why?"}])
    with mounted(model, adapter) as adapted:
        assert row["answers"]["mine"] == continuations(adapted, tokenizer, [prompt], 8)[0]
    assert row["answers"]["mine"] != row["answers"]["base"] == continuations(model, tokenizer, [prompt], 8)[0]
    assert "[" in command(*options).partition("mine: ")[2]
    raw = json.loads(command(*options, "--raw", "--json"))
    assert raw["prompts"][0]["answers"]["base"] == continuations(model, tokenizer, ["Why?"], 8)[0]


def test_in_a_chat_each_model_continues_its_own_conversation(tiny_model_dir, command, adapter, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Why?\nAnd then?\n"))
    said = re.sub(r"[][]", "", command("chat", "--tokens", 8))  # without the marks
    assert said.count("base: ") == said.count("mine") == 2
    model, tokenizer = load_model(str(tiny_model_dir))
    for folder in (None, adapter):
        turns = []
        with mounted(model, folder) as present:
            for words in ("Why?", "And then?"):
                turns.append({"role": "user", "content": words})
                (answer,) = continuations(present, tokenizer, [chat_prompt(tokenizer, turns)], 8)
                turns.append({"role": "assistant", "content": answer})
        assert re.sub(r"[][]", "", turns[-1]["content"]).strip() in said


def test_drift_is_what_is_measured_and_the_text_may_be_ones_own(tiny_model_dir, command, adapter, tmp_path):
    text = tmp_path / "prose.txt"
    text.write_text("The harbour master writes down every ship that comes in. " * 3)
    options = ("drift", "--text", text, "--tokens", 60)
    model, tokenizer = load_model(str(tiny_model_dir))
    reference = BaseReference.build(model, tokenizer, {"a": text.read_text()}, max_tokens=60)
    with mounted(model, adapter) as adapted:
        expected = measure_drift(adapted, reference)["a"]
    assert 0 < expected.greedy_changed <= 1
    assert json.loads(command(*options, "--json"))["drift"]["mine"]["prose.txt"] == pytest.approx(expected.as_dict())
    said = command(*options)
    assert f"{expected.greedy_changed:.1%}" in said
    assert f"hiplora protect {adapter}" in said


SCORED = ("--suite", "{data}", "--out", "{out}")
EDITED = ("builtin", "--limit", 1, "--steps", 1, "--locality", 0, "--method", "lora", "--out", "{out}")


@pytest.mark.parametrize(
    ("name", "options", "next_command"),
    [
        ("generate", ("--prompt", "Why?", "--tokens", 2), "chat {model}"),
        ("generate", ("--prompt", "Why?", "--tokens", 2, *ADAPTED), "drift {model} --adapter {adapter}"),
        ("eval", SCORED, "eval {model} --adapter DIR --suite {data} --out FILE"),
        ("eval", (*SCORED, *ADAPTED), "generate {model} --adapter {adapter} --prompt '…'"),
        ("edit", EDITED, "generate {model} --adapter {out}/adapter --prompt '…'"),
        ("edit", (*EDITED, "--mode", "single"), "edit {model} builtin --method lora --out DIR"),
    ],
)
def test_the_last_line_is_the_next_command(tiny_model_dir, adapter, tmp_path, capsys, name, options, next_command):
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Why?", "completion": " So."}])
    places = {"model": tiny_model_dir, "adapter": adapter, "data": data, "out": tmp_path / "out"}
    said = succeed(capsys, name, tiny_model_dir, *(str(option).format(**places) for option in options))
    assert said.splitlines()[-1].partition("   (")[0] == f"next: hiplora {next_command.format(**places)}"
