"""Adapters on 4-bit bases. In training mode throughout: in evaluation bitsandbytes repacks the weights on some CPUs."""

import peft
import pytest
import torch

import hiplora
from hiplora.errors import AdapterError
from hiplora.tuner import hip_layers
from tests.contract.conftest import logits, train
from tests.tiny import tiny_llama

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra: quant)")


def four_bit(model):
    """Quantise the attention projections of a tiny Llama to NF4, as transformers does on loading."""
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and "self_attn" in name:
            layer = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=torch.float32,
                quant_type="nf4",
            )
            layer.weight = bnb.nn.Params4bit(module.weight.data.clone(), requires_grad=False, quant_type="nf4").to(
                "cpu"
            )
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
    return model.train()


@pytest.fixture
def model(tiny):
    return peft.get_peft_model(four_bit(tiny_llama()), tiny.config()).train()


def fit(model, ids):
    losses = train(model, ids)
    model.train()
    return losses


def test_a_four_bit_base_is_adapted_and_trained(model, ids):
    assert torch.equal(logits(model, ids), logits(four_bit(tiny_llama()), ids))
    losses = fit(model, ids)
    assert losses[-1] < losses[0]
    assert hiplora.max_leak(model) < 1e-6
    assert all(isinstance(layer.get_base_layer(), bnb.nn.Linear4bit) for _, layer in hip_layers(model))


def test_the_adapter_returns_over_the_same_four_bit_base(model, ids, tmp_path):
    fit(model, ids)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(four_bit(tiny_llama()), tmp_path).train()
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_the_adapter_loads_over_the_unquantised_base_with_a_warning(model, ids, tmp_path):
    fit(model, ids)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="bnb 4bit"):
        loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert (logits(loaded, ids) - logits(model, ids)).norm() < 0.2 * logits(model, ids).norm()
    with pytest.raises(AdapterError, match="self_attn"):
        peft.PeftModel.from_pretrained(tiny_llama(seed=9), tmp_path)


def test_merging_requantises_and_unmerging_restores(model, ids):
    fit(model, ids)
    expected = logits(model, ids)
    model.merge_adapter()
    merged = logits(model, ids)
    assert (merged - expected).norm() < 0.2 * expected.norm()
    model.unmerge_adapter()
    assert torch.equal(logits(model, ids), expected)
