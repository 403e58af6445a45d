"""The price of answering unlike the base model: its value, whose gradient it has, and which text a step reads."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from hiplora.errors import ConfigError
from hiplora.training import train
from hiplora.training.attention import use_packed_attention
from hiplora.training.kl import KlPenalty, kl_penalty
from hiplora.training.recipe import TrainRecipe, load_recipe
from hiplora.tuner import HipLoraConfig, inputs
from hiplora.tuner.calibration import calibrate
from tests.tiny import tiny_llama, tiny_tokenizer, write_jsonl

ROWS = [torch.arange(0, 40) * 3 % 250, torch.arange(0, 30) * 7 % 250, torch.arange(5, 45)]


def adapted(**settings):
    return get_peft_model(
        tiny_llama(), LoraConfig(r=4, init_lora_weights=False, lora_dropout=0.5, **settings)
    )


def divergence(model, row):
    """The definition, token by token, on a text alone."""
    with torch.no_grad():
        q = F.log_softmax(model.eval()(row[None]).logits[0].double(), -1)
        with model.disable_adapter():
            p = F.log_softmax(model(row[None]).logits[0].double(), -1)
    return (p.exp() * (p - q)).sum().item()


@pytest.mark.parametrize("packed", [False, True])
def test_it_is_the_mean_divergence_per_token_each_text_by_itself(packed):
    model = adapted()
    penalty = KlPenalty(ROWS, 1.0, 65, seed=1)
    pieces = penalty.batch(3)
    assert sum(map(len, pieces)) <= 65
    expected = sum(divergence(model, piece) for piece in pieces) / sum(map(len, pieces))
    if packed:
        assert use_packed_attention(model.get_base_model(), 64)
    model.train()
    assert penalty(model, 3).item() == pytest.approx(expected, rel=1e-4)
    assert expected > 1e-3


def test_the_adapter_alone_gets_a_gradient_and_the_model_is_as_it_was():
    model = adapted(modules_to_save=["lm_head"])
    frozen = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    frozen.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    model.train()
    model.base_model.model.model.norm.eval()
    modes = {name: m.training for name, m in model.named_modules()}
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    KlPenalty(ROWS, 1.0, 30, seed=0)(model, 0).backward()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved == {name for name, flag in flags.items() if flag}


def test_an_adapter_without_an_update_costs_nothing():
    model = get_peft_model(tiny_llama(), LoraConfig(r=4))
    assert KlPenalty(ROWS, 1.0, 30, seed=0)(model, 0).item() == 0


def test_every_text_is_read_once_a_lap_in_an_order_of_seed_and_step_alone():
    rows = [torch.tensor([row] * 8) for row in range(6)]
    penalty = KlPenalty(rows, 1.0, 16, seed=3)
    read = [[int(piece[0]) for piece in penalty.batch(step)] for step in range(6)]
    laps = [[row for step in steps for row in step] for steps in (read[:3], read[3:])]
    assert [sorted(lap) for lap in laps] == [list(range(6))] * 2
    assert laps[0] != laps[1]
    again = KlPenalty(rows, 1.0, 16, seed=3)
    assert [int(piece[0]) for piece in again.batch(4)] == read[4]
    other = KlPenalty(rows, 1.0, 16, seed=4)
    assert [[int(piece[0]) for piece in other.batch(step)] for step in range(6)] != read


@pytest.mark.parametrize(("tokens", "lengths"), [(8, [8]), (24, [24]), (256, [256]), (300, [256, 44])])
def test_a_step_reads_as_many_tokens_as_were_asked_for(tokens, lengths):
    rows = [torch.zeros(256, dtype=torch.long)] * 5
    assert [len(piece) for piece in KlPenalty(rows, 1.0, tokens, seed=0).batch(7)] == lengths


def recipe(**changes):
    values = {"model": "m", "data": "d.jsonl", "method": "lora", "train": {"kl_weight": 0.5, **changes}}
    return TrainRecipe.model_validate(values)


def test_the_text_is_what_a_calibration_would_sample(monkeypatch):
    model, seen = tiny_llama(), []
    keep = inputs._run
    monkeypatch.setattr(
        inputs, "_run", lambda model, rows, *rest: (seen.append(rows), keep(model, rows, *rest))[1]
    )
    config = HipLoraConfig(
        basis="activation", basis_sides="input", principal_rank=4, target_modules=["q_proj"]
    )
    calibrate(model, config, tokens=500)
    penalty = kl_penalty(recipe(kl_pool=500, kl_tokens=512), model, None)
    assert {tuple(row.tolist()) for row in penalty.batch(0)} == {tuple(row.tolist()) for row in seen[0]}


def test_without_a_price_there_is_none():
    assert kl_penalty(TrainRecipe(model="m", data="d.jsonl"), tiny_llama(), None) is None


def test_a_text_of_its_own_is_read(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abc " * 100, encoding="utf-8")
    penalty = kl_penalty(recipe(kl_text=path, kl_pool=40, kl_tokens=40), tiny_llama(), tiny_tokenizer())
    assert tiny_tokenizer().decode(penalty.batch(0)[0]) == "abc " * 10


@pytest.mark.parametrize("name", ["kl_text", "kl_tokens", "kl_pool"])
def test_settings_without_a_price_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` has no use with `kl_weight: 0`"):
        recipe(kl_weight=0.0, **{name: "text.txt" if name == "kl_text" else 77})


def test_a_method_that_moves_the_base_is_refused():
    with pytest.raises(ValueError, match="compares with the base model, whose weights pissa moves"):
        TrainRecipe(model="m", data="d.jsonl", method="pissa", train={"kl_weight": 1.0})


def test_a_text_that_is_not_there_is_found_before_anything_is_loaded(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: some/model\ndata: rows.jsonl\nmethod: lora\ntrain:\n  kl_weight: 1.0\n  kl_text: ./no.txt\n"
    )
    with pytest.raises(ConfigError, match=r"line 6: train\.kl_text: no such file: .*no\.txt"):
        load_recipe(file)


# In a training.

METHODS = {
    "lora": {"name": "lora"},
    "adalora": {"name": "adalora", "r": 2, "tinit": 0, "tfinal": 1},
    "hiplora": {"name": "hiplora", "preset": "paper", "principal_rank": 8},
    "split_lora": {"name": "split_lora", "clients": 2, "cut_layer": 1},
}
SETTINGS = {
    "steps": 4,
    "batch_size": 2,
    "gradient_accumulation": 2,
    "max_length": 64,
    "lr": 1e-2,
    "dtype": "fp32",
    "save_every": 2,
    "kl_weight": 0.5,
    "kl_tokens": 32,
    "kl_pool": 128,
}


@pytest.fixture(scope="module")
def made(tiny_model_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    write_jsonl(path, [{"prompt": f"Say {n}: ", "completion": f"{n} it is"} for n in range(16)])

    def make(method, **settings):
        values = METHODS[method] if isinstance(method, str) else method
        return TrainRecipe.model_validate(
            {
                "model": str(tiny_model_dir),
                "data": path,
                "method": values,
                "train": {**SETTINGS, **settings},
            }
        )

    return make


def column(result, name):
    return [row[name] for row in result.metrics]


class Stopped(Exception):
    pass


def stop(row):
    if row["step"] == 3:
        raise Stopped


@pytest.mark.parametrize("method", METHODS)
def test_it_is_recorded_every_step_and_a_killed_run_is_resumed_exactly(made, tmp_path, method):
    whole = train(made(method), tmp_path / "whole")
    with pytest.raises(Stopped):
        train(made(method), tmp_path / "parts", on_step=stop)
    parts = train(made(method), tmp_path / "parts")
    assert column(parts, "kl") == column(whole, "kl")
    assert column(parts, "loss") == column(whole, "loss")
    assert column(whole, "kl")[:2] == [0, 0]  # the first step's rate is 0, to warm up
    assert all(value > 0 for value in column(whole, "kl")[2:])
    names = ("adapter_model.safetensors",)
    assert all((whole.adapter / name).read_bytes() == (parts.adapter / name).read_bytes() for name in names)


def test_a_high_price_keeps_the_model_closer_to_its_base(made, tmp_path):
    steps = {"steps": 24, "save_every": 24}
    cheap = train(made("lora", kl_weight=1e-9, **steps), tmp_path / "cheap")
    dear = train(made("lora", kl_weight=100.0, **steps), tmp_path / "dear")
    assert column(dear, "kl")[-1] < 0.75 * column(cheap, "kl")[-1]


def test_it_counts_once_a_step_however_many_passes_a_step_has(made, tmp_path):
    settings = {"packing": False, "kl_weight": 20.0, "max_grad_norm": 0.0}
    plain = {"name": "lora", "lora_dropout": 0.0}
    one = train(made(plain, batch_size=4, gradient_accumulation=1, **settings), tmp_path / "one")
    four = train(made(plain, batch_size=1, gradient_accumulation=4, **settings), tmp_path / "four")
    assert column(one, "kl")[2:] == pytest.approx(column(four, "kl")[2:], rel=1e-3)
    assert column(one, "loss") == pytest.approx(column(four, "loss"), rel=1e-4)


def test_the_mean_of_the_steps_since_the_last_row_is_recorded(made, tmp_path):
    each = train(made("lora"), tmp_path / "each")
    pairs = train(made("lora", log_every=2), tmp_path / "pairs")
    found = column(each, "kl")
    assert column(pairs, "kl") == pytest.approx([sum(found[:2]) / 2, sum(found[2:]) / 2])
