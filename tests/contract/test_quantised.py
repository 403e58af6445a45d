"""Adapters on quantised bases. In training mode where bitsandbytes would repack 4-bit weights on some CPUs."""

import peft
import pytest
import torch

import hiplora
from hiplora import HipLoraConfig
from hiplora.errors import AdapterError
from hiplora.tuner import frozen_weight
from tests.contract.conftest import logits, train
from tests.tiny import tiny_llama

Q = "model.layers.0.self_attn.q_proj"


def bnb_layer(module, bits, **settings):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra: quant)")
    shape, weight = (module.in_features, module.out_features), module.weight.data.clone()
    if bits == 8:
        layer = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")
    else:
        layer = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", **settings).to("cpu")
    return layer


def torchao_layer(module):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    torchao.quantize_(module, torchao.Int8WeightOnlyConfig())
    return module


def hqq_layer(module):
    hqq = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed")
    settings = hqq.BaseQuantizeConfig(nbits=4, group_size=32)
    return hqq.HQQLinear(module, settings, compute_dtype=torch.float32, device="cpu")


KINDS = {
    "hqq": hqq_layer,
    "4bit": lambda module: bnb_layer(module, 4),
    "4bit double": lambda module: bnb_layer(module, 4, compress_statistics=True),
    "8bit": lambda module: bnb_layer(module, 8),
    "torchao": torchao_layer,
}


def quantised(kind):
    """Quantise the attention projections of a tiny Llama, as transformers does on loading."""
    model = tiny_llama()
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and "self_attn" in name:
            model.set_submodule(name, KINDS[kind](module))
    if kind == "torchao":  # what transformers' loading leaves there
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        settings = TorchAoConfig(quant_type=Int8WeightOnlyConfig())
        model.hf_quantizer = type("Quantizer", (), {"quantization_config": settings})()
    return model.train()


def fit(model, ids):
    losses = train(model, ids)
    model.train()
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_is_adapted_trained_saved_and_loaded(tiny, ids, tmp_path, kind):
    model = peft.get_peft_model(quantised(kind), tiny.config()).train()
    assert torch.equal(logits(model, ids), logits(quantised(kind), ids))
    losses = fit(model, ids)
    assert losses[-1] < losses[0]
    assert hiplora.max_leak(model) < 1e-6
    layer = model.get_submodule(f"base_model.model.{Q}")
    assert type(layer.get_base_layer()) is type(quantised(kind).get_submodule(Q))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(quantised(kind), tmp_path).train()
    assert torch.allclose(logits(loaded, ids), logits(model, ids), atol=1e-6)

    with pytest.warns(UserWarning, match="another precision"):
        loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert (logits(loaded, ids) - logits(model, ids)).norm() < 0.2 * logits(model, ids).norm()
    with pytest.raises(AdapterError, match="self_attn"):
        peft.PeftModel.from_pretrained(tiny_llama(seed=9), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_requantises_and_unmerging_restores(tiny, ids, kind):
    model = peft.get_peft_model(quantised(kind), tiny.config()).train()
    bare = logits(model, ids)
    fit(model, ids)
    expected = logits(model, ids)
    model.merge_adapter()
    merged = logits(model, ids)
    assert (merged - expected).norm() < 0.2 * expected.norm()
    model.unmerge_adapter()
    assert torch.equal(logits(model, ids), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), bare)
    plain = model.merge_and_unload()
    assert torch.equal(logits(plain, ids), merged)


@pytest.mark.parametrize("kind", ["4bit", "4bit double"])
def test_a_four_bit_weight_reads_the_same_after_an_evaluation_pass(tiny, ids, tmp_path, kind):
    base = quantised(kind)
    before = frozen_weight(base.get_submodule(Q))
    logits(base.eval(), ids)
    if not getattr(base.get_submodule(Q).weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this CPU has no AVX512-BF16, for which bitsandbytes packs the weight anew")
    assert (frozen_weight(base.get_submodule(Q)) - before).norm() < 0.02 * before.norm()
    model = peft.get_peft_model(base, tiny.config())
    fit(model, ids)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="another precision"):
        peft.PeftModel.from_pretrained(quantised(kind), tmp_path)


@pytest.mark.parametrize("preset", ["paper", "function-aware"])
@pytest.mark.parametrize("evaluated", [True, False])
def test_evaluation_takes_no_gradient_from_a_4_bit_base(ids, preset, evaluated):
    """Where the CPU has AVX512-BF16, bitsandbytes packs weights in evaluation, and nothing could be trained on then."""
    base = quantised("4bit").eval()
    if evaluated:
        logits(base, ids)
    settings = {"r": 4, "principal_rank": 4, "target_modules": ["q_proj"], "principal_channel": True}
    model = peft.get_peft_model(base, HipLoraConfig(preset=preset, **settings))
    for _ in range(2):
        logits(model.eval(), ids)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        last = model.get_submodule(f"base_model.model.{Q}").hiplora_delta["default"]
        assert last.grad is not None
        assert last.grad.abs().max() > 0
        last.grad = None
