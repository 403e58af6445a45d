import json
import shutil

import pytest
import torch

from hiplora.adapters import BaseWeights
from hiplora.adapters.base import in_precision
from hiplora.errors import AdapterError
from hiplora.spectral import weight_fingerprint
from tests.tiny import tiny_llama
from tests.unit.adapters.samples import base_model, save_tiny_gpt2


def linear_layers(model):
    return {name: m.weight for name, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}


@pytest.mark.parametrize("kind", ["tied", "bf16"])
def test_every_weight_is_read_as_stored(tmp_path, kind):
    model = tiny_llama(tie=kind == "tied", dtype=torch.bfloat16 if kind == "bf16" else torch.float32)
    model.save_pretrained(tmp_path / "m")
    weights = BaseWeights(str(tmp_path / "m"))
    for name, weight in linear_layers(model).items():
        assert torch.equal(weights.weight(name), weight)


def test_transposed_weights_come_as_out_by_in(tmp_path):
    base = save_tiny_gpt2(tmp_path / "gpt2")
    weights = BaseWeights(str(base))
    for name, weight in linear_layers(base_model(base)).items():
        assert torch.equal(weights.weight(name), weight if name == "lm_head" else weight.T)


@pytest.mark.parametrize("module", ["model.layers.9.self_attn.q_proj", "model.norm"])
def test_a_layer_that_the_model_lacks_is_named(tiny_model_dir, module):
    with pytest.raises(AdapterError, match=f"has no linear layer {module}.*--base"):
        BaseWeights(str(tiny_model_dir)).weight(module)


def test_a_model_that_cannot_be_read_is_named_with_the_way_out(tiny_model_dir, tmp_path):
    with pytest.raises(AdapterError, match=r"nowhere.*--base"):
        BaseWeights(str(tmp_path / "nowhere"))
    broken = shutil.copytree(tiny_model_dir, tmp_path / "broken")
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(AdapterError, match=r"broken: cannot be read"):
        BaseWeights(str(broken)).weight("lm_head")
    (broken / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    with pytest.raises(AdapterError, match=r"broken: cannot be read"):
        BaseWeights(str(broken))


def test_a_weight_is_recognised_in_the_precision_that_the_adapter_saw():
    weight = torch.randn(8, 6)
    rounded = weight.bfloat16()
    assert torch.equal(in_precision(weight, weight_fingerprint(weight), "float32"), weight)
    assert torch.equal(in_precision(rounded, weight_fingerprint(rounded.float()), "float32"), rounded)
    assert torch.equal(in_precision(weight, weight_fingerprint(rounded), "bfloat16"), rounded)
    for precision in ("float32", "bitsandbytes", ""):
        assert in_precision(weight, weight_fingerprint(rounded), precision) is None
