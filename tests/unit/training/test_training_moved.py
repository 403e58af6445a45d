"""Methods that move the base: at the start nothing is changed, and what is saved is right on the untouched base."""

import json

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.corda import preprocess_corda
from safetensors.torch import load_file

from hiplora.errors import ConfigError
from hiplora.training import moved_starts
from hiplora.training.adapters import adapter_config
from hiplora.training.methods import METHODS
from hiplora.training.moved import layers, move_base, restore_start, save_start, split_difference, take_start
from hiplora.training.moved_starts import prepare_start, without_own_start
from hiplora.training.residual_init import save_difference
from hiplora.tuner.inputs import CalibrationText, input_bases, least_inputs
from tests.tiny import tiny_llama, tiny_tokenizer

MOVED = [name for name, method in METHODS.items() if method.moves_base]
PLAIN = {"r": 4}
PATTERNS = {
    "r": 4,
    "lora_alpha": 12,
    "target_modules": "all-linear",
    "exclude_modules": ["up_proj"],
    "rank_pattern": {"k_proj": 2, "layers.1.mlp.down_proj": 3},
    "alpha_pattern": {"q_proj": 3.0},
    "modules_to_save": ["lm_head"],
}


def logits(model, ids=None):
    with torch.no_grad():
        return model.eval()(torch.arange(40)[None] * 5 % 250 if ids is None else ids).logits


def started(name, settings=PLAIN, model=None):
    """A model at a method's start, as a recipe's method puts it there."""
    model = model or tiny_llama()
    calibration = {"calibration_tokens": 1024} if name in ("corda", "lora_null") else {}
    method = METHODS[name](**{**calibration, **settings})
    config = adapter_config(method)
    put_on = prepare_start(method, config, model, tiny_tokenizer())
    adapted = get_peft_model(model, config)
    put_on(adapted)
    return adapted


def trained(adapted):
    """As after a training: every trainable parameter has moved."""
    generator = torch.Generator().manual_seed(3)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return adapted


def start_of(layer):
    """The scaled product at the start, (out, in)."""
    return layer.get_delta_weight("default").detach()


@pytest.mark.parametrize("settings", [PLAIN, PATTERNS], ids=["plain", "patterns"])
@pytest.mark.parametrize("name", MOVED)
def test_at_the_start_the_model_is_the_base_and_its_weights_are_not(name, settings):
    base = tiny_llama()
    adapted = started(name, settings)
    torch.testing.assert_close(logits(adapted), logits(base), rtol=0, atol=2e-6)
    assert list(layers(adapted))
    for path, layer in layers(adapted):
        before, after = base.get_submodule(path).weight, layer.get_base_layer().weight
        torch.testing.assert_close(after + start_of(layer), before, rtol=0, atol=1e-6)
        assert (after - before).norm() > 1e-3 * before.norm()
        assert layer.lora_A["default"].weight.dtype == torch.float32


def test_milora_starts_at_the_minor_part_whatever_its_scaling():
    base, adapted = tiny_llama(), started("milora", PATTERNS)
    for path, layer in layers(adapted):
        U, sigma, Vt = torch.linalg.svd(base.get_submodule(path).weight.detach(), full_matrices=False)
        r = layer.r["default"]
        minor = U[:, -r:] * sigma[-r:] @ Vt[-r:]
        torch.testing.assert_close(start_of(layer), minor, rtol=0, atol=1e-6)
    assert {layer.r["default"] for _, layer in layers(adapted)} == {2, 3, 4}


@pytest.mark.parametrize(("tokens", "share"), [(40, 1e-9), (1024, 0.5)])
def test_lora_nulls_start_sees_as_little_as_can_be_of_the_calibration_text(tokens, share):
    """Of 40 tokens it sees nothing, since 64 inputs have more directions; of many what no other would see less of."""
    base = tiny_llama()
    rows = CalibrationText(base, None, tokens, 8, 0, None)._texts
    adapted = started("lora_null", {"r": 4, "calibration_tokens": tokens})
    seen = {}
    for path, layer in layers(adapted):
        layer.register_forward_pre_hook(lambda _, args, path=path: seen.setdefault(path, []).append(args[0]))
    for row in rows:
        logits(adapted, row[None])
    for path, layer in layers(adapted):
        x = torch.cat([part.flatten(0, 1) for part in seen[path]]).double()
        start, weight = start_of(layer), base.get_submodule(path).weight.detach()
        N = torch.linalg.qr(layer.lora_A["default"].weight.detach().double().T).Q
        torch.testing.assert_close(start, weight @ (N @ N.T).float(), rtol=0, atol=1e-5)
        energy, every = (x @ N).square().sum() / 4, x.square().sum() / 64
        least = torch.linalg.eigvalsh(x.T @ x)[:4].sum() / 4
        assert energy < share * every
        assert energy < 1.001 * least + 1e-9 * every


def test_what_least_measures_are_the_last_eigenvectors_of_the_same_moment():
    model, name = tiny_llama(), "model.layers.0.mlp.down_proj"
    least = least_inputs(model, {name: 5}, tokens=1024)[name]
    whole = input_bases(model, [name], tokens=1024)[name]
    torch.testing.assert_close(least.values, whole.values[-5:], rtol=1e-6, atol=1e-15)
    overlap = torch.linalg.svdvals(least.vectors.T @ whole.vectors[:, -5:])
    assert overlap.min() > 0.999
    again = least_inputs(model, {name: 5}, tokens=1024)[name]  # from the store
    assert torch.equal(again.vectors, least.vectors)


def test_layers_with_one_input_share_what_was_measured_and_each_has_its_own_number():
    ranks = {f"model.layers.0.self_attn.{kind}_proj": r for kind, r in (("q", 4), ("k", 2), ("v", 4))}
    found = least_inputs(tiny_llama(), ranks, tokens=512)
    q, k, v = found.values()
    assert (q.vectors.shape, k.vectors.shape) == ((64, 4), (64, 2))
    assert torch.equal(q.vectors, v.vectors)


def test_corda_is_pefts_own_on_the_rows_of_the_activation_basis():
    model = tiny_llama()
    rows = CalibrationText(model, None, 1024, 8, 0, None)._texts
    config = LoraConfig(
        r=4,
        lora_alpha=32,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        init_lora_weights="corda",
        corda_config={"corda_method": "kpm"},
    )
    preprocess_corda(model, config, lambda: [model(row[None]) for row in rows])
    reference = get_peft_model(model, config)
    adapted = started("corda")
    for (path, one), (_, other) in zip(layers(adapted), layers(reference), strict=True):
        torch.testing.assert_close(start_of(one), start_of(other), rtol=0, atol=1e-6, msg=path)
    left = ("eigens", "covariance_matrix", "corda_method", "sample_count")
    assert not [name for name, module in adapted.named_modules() if any(hasattr(module, a) for a in left)]


def test_preparing_leaves_the_modes_of_the_model_as_they_were():
    model = tiny_llama().train()
    method = METHODS["corda"](r=4, calibration_tokens=512)
    prepare_start(method, adapter_config(method), model, tiny_tokenizer())
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("settings", [PLAIN, PATTERNS], ids=["plain", "patterns"])
@pytest.mark.parametrize("name", MOVED)
def test_stock_peft_brings_the_untouched_base_to_the_trained_model(tmp_path, name, settings):
    adapted = started(name, settings)
    save_start(adapted, tmp_path / "start")
    expected = logits(trained(adapted))
    save_difference(adapted, tmp_path / "out", tmp_path / "start")
    plain = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-5)
    assert (logits(tiny_llama()) - expected).abs().max() > 0.05


def test_the_scaling_is_kept_with_rslora_and_patterns(tmp_path):
    """PEFT's own conversion refuses these together."""
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "k_proj", "down_proj"],
        use_rslora=True,
        rank_pattern={"k_proj": 2},
        alpha_pattern={"q_proj": 3.0},
    )
    adapted = get_peft_model(tiny_llama(), config)
    for path, layer in layers(adapted):
        A, B = (getattr(layer, f"lora_{kind}")["default"].weight for kind in "AB")
        generator = torch.Generator().manual_seed(len(path))
        move_base(layer, 0.1 * torch.randn(B.shape, generator=generator), A.detach().clone())
    torch.testing.assert_close(logits(adapted), logits(tiny_llama()), rtol=0, atol=2e-6)
    save_start(adapted, tmp_path / "start")
    expected = logits(trained(adapted))
    save_difference(adapted, tmp_path / "out", tmp_path / "start")
    plain = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-5)
    stored = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (stored["r"], stored["rank_pattern"], stored["init_lora_weights"]) == (8, {"k_proj": 4}, True)


@pytest.mark.parametrize("name", MOVED)
def test_the_trained_factors_come_first_and_the_start_after_them(tmp_path, name):
    adapted = started(name, PATTERNS)
    save_start(adapted, tmp_path / "start")
    trained(adapted)
    save_difference(adapted, tmp_path / "out", tmp_path / "start")
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for path, layer in layers(adapted):
        A = saved[f"base_model.model.{path}.lora_A.weight"]
        B = saved[f"base_model.model.{path}.lora_B.weight"]
        r = layer.r["default"]
        assert torch.equal(A[:r], layer.lora_A["default"].weight)
        assert torch.equal(B[:, :r], layer.lora_B["default"].weight)
    ends, start = split_difference(saved)
    stored = load_file(tmp_path / "start" / "adapter_model.safetensors")
    assert start.keys() == stored.keys()
    assert all(torch.equal(start[key], stored[key]) for key in stored)
    assert ends.keys() == saved.keys()


@pytest.mark.parametrize("name", MOVED)
def test_a_start_that_was_kept_comes_back_to_the_bit_without_computing_it(tmp_path, monkeypatch, name):
    adapted = started(name)
    save_start(adapted, tmp_path / "start")
    monkeypatch.setattr(torch.linalg, "svd", lambda *args, **kwargs: pytest.fail("decomposed again"))
    config = adapter_config(METHODS[name](**PLAIN))
    without_own_start(config)
    again = get_peft_model(tiny_llama(), config)
    restore_start(again, tmp_path / "start")
    for (path, one), (_, other) in zip(layers(again), layers(adapted), strict=True):
        assert torch.equal(one.get_base_layer().weight, other.get_base_layer().weight), path
        for kind in ("lora_A", "lora_B"):
            assert torch.equal(getattr(one, kind)["default"].weight, getattr(other, kind)["default"].weight)


def test_a_start_of_another_rank_or_of_other_modules_is_named(tmp_path):
    adapted = started("milora", {"r": 4, "target_modules": ["q_proj"]})
    save_start(adapted, tmp_path / "start")
    start = load_file(tmp_path / "start" / "adapter_model.safetensors")
    for settings, said in (
        ({"r": 3, "target_modules": ["q_proj"]}, r"has \(4, 64\) .*q_proj\.lora_A.* needs \(3, 64\)"),
        ({"r": 4, "target_modules": ["v_proj"]}, r"has no .*v_proj\.lora_A"),
    ):
        other = get_peft_model(tiny_llama(), adapter_config(METHODS["lora"](**settings)))
        with pytest.raises(ConfigError, match=said):
            take_start(other, start)


@pytest.mark.parametrize("name", MOVED)
def test_in_bf16_the_start_is_exact_to_the_weights_own_rounding(name):
    adapted = started(name, model=tiny_llama(dtype=torch.bfloat16))
    base = tiny_llama(dtype=torch.bfloat16)
    for path, layer in layers(adapted):
        weight = base.get_submodule(path).weight.float()
        rest = layer.get_base_layer().weight
        assert rest.dtype == torch.bfloat16
        rounding = (rest.float() + start_of(layer).float() - weight).abs()
        assert (rounding <= 2**-8 * rest.float().abs() + 1e-7).all(), path


@pytest.mark.parametrize("name", MOVED)
def test_a_weight_that_no_part_can_be_taken_from_is_refused(name):
    model = tiny_llama().double()
    method = METHODS[name](**PLAIN)
    with pytest.raises(ConfigError, match=r"q_proj: its weight is torch\.float64, .*load the model in fp32"):
        prepare_start(method, adapter_config(method), model, tiny_tokenizer())


def test_every_method_that_moves_the_base_has_a_start():
    assert sorted(moved_starts._STARTS) == sorted(MOVED)


def test_the_text_of_a_file_is_what_is_measured(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("The ferry leaves at nine and comes back at noon. " * 40)
    own, sampled = (
        dict(layers(started("lora_null", {"r": 4, **extra})))
        for extra in ({"calibration_text": str(text)}, {})
    )
    path = "model.layers.0.self_attn.q_proj"
    assert (start_of(own[path]) - start_of(sampled[path])).abs().max() > 1e-3


def test_layers_that_lie_the_other_way_round_start_right():
    """GPT-2's weights are stored as (in, out)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = GPT2LMHeadModel(
        GPT2Config(
            n_embd=16, n_layer=1, n_head=2, vocab_size=300, n_positions=64, bos_token_id=0, eos_token_id=1
        )
    ).eval()
    before = logits(base)
    method = METHODS["milora"](r=3, target_modules=["c_attn"])
    config = adapter_config(method)
    put_on = prepare_start(method, config, base, tiny_tokenizer())
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        adapted = get_peft_model(base, config)
    put_on(adapted)
    torch.testing.assert_close(logits(adapted), before, rtol=0, atol=2e-6)
