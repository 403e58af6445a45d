"""A model that reads few tokens at most, and crashes beyond them: nothing that commands do goes there."""

import json
import re

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from hiplora.evaluation.answers import continuations
from hiplora.models import load
from hiplora.positions import context_length, position_limit
from hiplora.training.sequences import keeps_rows_apart
from tests.commands import run, succeed
from tests.models.zoo import CASE, SIZES
from tests.tiny import VOCABULARY, tiny_tokenizer, write_jsonl

CONTEXT = 96


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("short") / "model"
    ends = {"bos_token_id": 256, "eos_token_id": 257}
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=CONTEXT, **ends)
    ).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path):
    lengths = (10, 40, 70, 200)
    return write_jsonl(
        tmp_path / "rows.jsonl", [{"prompt": "a" * n, "completion": "b" * m} for n in lengths for m in (5, 200)]
    )


METHOD = ("--set", "method.r=2", "--set", "method.principal_rank=4", "--set", "method.calibration_tokens=500")


def commands(model, rows, out):
    training = ("train", "--model", model, "--data", rows, "--set", "train.drift_tokens=200", *METHOD)
    small = ("--methods", "lora-mlp,hiplora", "--rank", 2, "--principal-rank", 4, "--steps", 1)
    return {
        "train": (*training, "--set", "train.steps=1", "--set", "data.held_out_fraction=0.5", "--out", out),
        "preview": (*training, "--dry-run"),
        "compare": ("compare", model, rows, *small, "--heldout-fraction", 0.4, "--out", out),
        "generate": ("generate", model, "--prompt", "a" * (CONTEXT - 4), "--tokens", 50),
    }


@pytest.mark.parametrize("name", ["train", "preview", "compare", "generate"])
def test_what_is_longer_is_cut_to_the_context(name, model, rows, tmp_path, capsys):
    code, said, err = run(capsys, *commands(model, rows, tmp_path / "out")[name], "--json")
    assert code == 0, err
    record = json.loads(said)
    if name == "preview":
        assert record["data"]["tokens"] <= CONTEXT * record["data"]["sequences"]
    if name == "compare":
        assert "2 methods, 1 steps" in err
        assert record == json.loads((tmp_path / "out" / "results.json").read_text())


@pytest.mark.parametrize("name", ["calibrate", "train", "protect", "export"])
def test_texts_and_rows_to_measure_on_are_cut_to_the_context(name, model, rows, tmp_path, capsys):
    text, adapter, out = tmp_path / "text.txt", tmp_path / "adapter", tmp_path / "out"
    text.write_text("It goes on and on. " * 100)
    options = {
        "calibrate": (model, "--text", text, "--tokens", 500, "--rank", 4),
        "protect": (adapter, "--text", text, "--data", rows, "--tokens", 500, "--principal-rank", 4, "--out", out),
        "export": (adapter, "--to", "dense", "--tolerance", 0.1, "--data", rows, "--out", out),
    }
    training = [*commands(model, rows, adapter)["train"], "--set", f"method.calibration_text={text}"]
    if name != "calibrate":
        succeed(capsys, *training)
    training[-3] = out
    options["train"] = (*training[1:], "--set", f"train.start_from={adapter}")
    succeed(capsys, name, *options[name])


def test_only_the_prompts_that_need_it_are_cut_short(model):
    network, tokenizer = load(str(model))
    prompts = ["a", "b" * (CONTEXT - 4), "c" * 9]
    together = continuations(network, tokenizer, prompts, 20)
    assert together == [continuations(network, tokenizer, [prompt], 20)[0] for prompt in prompts]
    assert max(len(tokenizer(text)["input_ids"]) for text in together[::2]) > 4


def test_positions_that_go_on_by_a_rule_end_nowhere(model, tiny_model_dir):
    assert position_limit(load(str(model))[0]) == CONTEXT
    network = load(str(tiny_model_dir))[0]
    assert context_length(network) is not None
    assert position_limit(network) is None
    opt = OPTConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=64)
    assert position_limit(OPTForCausalLM(opt)) == opt.max_position_embeddings


ENDING = ["GPT-2", "GPT-Neo", "OPT", "GPT-J", "CodeGen", "CTRL", "MPT"]


@pytest.mark.parametrize("name", [*ENDING, "BLOOM", "Mamba", "Phi-3"])
@torch.no_grad()
def test_the_limit_is_where_a_model_fails_and_rows_in_one_sequence_do_not_reach_it(name):
    network = CASE[name].make()
    ids = torch.arange(3 * SIZES["max_position_embeddings"])[None] % 60
    limit = position_limit(network)
    assert (limit is not None) == (name in ENDING)
    if limit is not None:
        network(input_ids=ids[:, :limit])
        with pytest.raises((IndexError, RuntimeError)):
            network(input_ids=ids[:, : limit + 1])
    else:
        network(input_ids=ids)
    if keeps_rows_apart(network):
        places = torch.arange(ids.shape[1])[None] % SIZES["max_position_embeddings"]
        network(input_ids=ids, position_ids=places)


def test_a_prompt_that_fills_it_is_refused_before_a_comparison_begins(model, rows, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("Why? " * CONTEXT)
    comparison = commands(model, rows, tmp_path / "out")["compare"]
    code, _, err = run(capsys, *comparison, "--prompts", tmp_path / "prompts.txt")
    assert (code, f"context of {CONTEXT} tokens" in err, (tmp_path / "out").exists()) == (2, True, False)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        *[(prompt, "is not UTF-8, or has half a character") for prompt in ("Gr\udcfc", "\ud83d")],
        ("Why? " * CONTEXT, f"has {5 * CONTEXT} tokens.*the model's context is {CONTEXT}"),
    ],
)
def test_a_prompt_that_fills_the_context_or_is_no_text_is_refused_by_name(prompt, said, model, capsys):
    code, _, err = run(capsys, "generate", model, "--prompt", prompt)
    assert code == 2
    assert re.search(said, err)


@pytest.mark.parametrize(("max_length", "warned"), [(4096, True), (2048, False)])
def test_rows_longer_than_a_model_was_made_for_are_counted(max_length, warned, tiny_model_dir, tmp_path, capsys):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b" * n} for n in (9, 3000)])
    command = ("train", "--model", tiny_model_dir, "--data", rows, "--set", f"train.max_length={max_length}", *METHOD)
    notes = json.loads(succeed(capsys, *command, "--dry-run", "--json"))["notes"]
    assert any("1 of 2 rows are longer than the 2048 tokens" in note for note in notes) == warned
