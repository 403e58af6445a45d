"""Methods that move the base: nothing changes at the start, and what is saved is right on the untouched base."""

import peft
import pytest
import torch
from safetensors.torch import load_file

from hiplora.errors import ConfigError
from hiplora.training.adapt import put_on, save_trained
from hiplora.training.baselines import METHODS
from hiplora.training.baselines.lora import _layers, split_difference
from hiplora.tuner import sampled_rows
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.unit.adapters.samples import base_model, logits, save_tiny_gpt2

MOVED = [name for name, method in METHODS.items() if method.moves_base]
PLAIN = {"r": 4}
PATTERNS = {
    "r": 4, "lora_alpha": 12, "target_modules": "all-linear", "exclude_modules": ["up_proj"],
    "rank_pattern": {"k_proj": 2, "layers.1.mlp.down_proj": 3}, "alpha_pattern": {"q_proj": 3.0},
    "modules_to_save": ["lm_head"],
}  # fmt: skip
BOTH = pytest.mark.parametrize("settings", [PLAIN, PATTERNS], ids=["plain", "patterns"])
EACH = pytest.mark.parametrize("name", MOVED)


def method_of(name, settings=PLAIN):
    calibration = {"calibration_tokens": 1024} if name in ("corda", "lora_null") else {}
    return METHODS[name](**{**calibration, **settings})


def started(name, settings=PLAIN, model=None, start=None):
    return put_on(method_of(name, settings), model or tiny_llama(), tiny_tokenizer(), seed=0, start=start)


def start_of(layer):
    return layer.get_delta_weight("default").detach()


@BOTH
@EACH
def test_the_model_starts_as_the_base_its_weights_do_not(name, settings):
    base, adapted = tiny_llama(), started(name, settings)
    torch.testing.assert_close(logits(adapted.eval()), logits(base), rtol=0, atol=2e-6)
    assert list(_layers(adapted))
    for path, layer in _layers(adapted):
        before, after = base.get_submodule(path).weight, layer.get_base_layer().weight
        torch.testing.assert_close(after + start_of(layer), before, rtol=0, atol=1e-6)
        assert (after - before).norm() > 1e-3 * before.norm()


def test_milora_starts_at_the_minor_part_at_every_scaling():
    base = tiny_llama()
    for path, layer in _layers(started("milora", PATTERNS)):
        U, sigma, Vt = torch.linalg.svd(base.get_submodule(path).weight.detach(), full_matrices=False)
        r = layer.r["default"]
        torch.testing.assert_close(start_of(layer), U[:, -r:] * sigma[-r:] @ Vt[-r:], rtol=0, atol=1e-6)


def test_lora_null_starts_where_the_calibration_text_has_no_energy():
    """64 inputs have more directions than 40 tokens."""
    base, seen = tiny_llama(), {}
    adapted = started("lora_null", {"r": 4, "calibration_tokens": 40})
    for path, layer in _layers(adapted):
        layer.register_forward_pre_hook(lambda _, args, path=path: seen.setdefault(path, []).append(args[0]))
    for row in sampled_rows(base, 40):
        with torch.no_grad():
            adapted(row[None])
    for path, layer in _layers(adapted):
        x = torch.cat([part.flatten(0, 1) for part in seen[path]]).double()
        N = torch.linalg.qr(layer.lora_A["default"].weight.detach().double().T).Q
        weight = base.get_submodule(path).weight.detach()
        torch.testing.assert_close(start_of(layer), weight @ (N @ N.T).float(), rtol=0, atol=1e-5)
        assert (x @ N).square().sum() < 1e-4 * x.square().sum()


@BOTH
@EACH
def test_stock_peft_brings_the_untouched_base_to_the_trained_model(tmp_path, name, settings):
    adapted = started(name, settings, start=tmp_path / "start")
    for parameter in adapted.parameters():  # as after a training
        parameter.data += 0.05 * torch.randn(parameter.shape) * parameter.requires_grad
    expected = logits(adapted.eval())
    save_trained(method_of(name, settings), adapted, tmp_path / "out", tmp_path / "start")
    plain = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-5)
    assert (logits(tiny_llama()) - expected).abs().max() > 0.05
    ends, start = split_difference(load_file(tmp_path / "out" / "adapter_model.safetensors"))
    stored = load_file(tmp_path / "start" / "adapter_model.safetensors")
    assert all(torch.equal(start[key], stored[key]) for key in stored)
    assert start.keys() == stored.keys() <= ends.keys()


@EACH
def test_in_bf16_the_start_is_exact_to_the_weights_own_rounding(name):
    adapted, base = (started(name, model=tiny_llama(dtype=torch.bfloat16)), tiny_llama(dtype=torch.bfloat16))
    for path, layer in _layers(adapted):
        weight, rest = base.get_submodule(path).weight.float(), layer.get_base_layer().weight
        assert (rest.dtype, layer.lora_A["default"].weight.dtype) == (torch.bfloat16, torch.float32)
        rounding = (rest.float() + start_of(layer).float() - weight).abs()
        assert (rounding <= 2**-8 * rest.float().abs() + 1e-7).all(), path


@EACH
def test_what_does_not_fit_the_weights_is_refused(name):
    with pytest.raises(ConfigError, match=r"q_proj: nothing can be subtracted from a weight of type torch\.float64"):
        started(name, model=tiny_llama().double())


def test_weights_stored_as_in_by_out_start_right(tmp_path):
    """As GPT-2's."""
    base = base_model(save_tiny_gpt2(tmp_path))
    before = logits(base)
    adapted = started("milora", {"r": 3, "target_modules": ["c_attn"]}, model=base)
    torch.testing.assert_close(logits(adapted.eval()), before, rtol=0, atol=2e-6)
