import pytest
import torch

from hiplora.adapters.base_weights import BaseWeights, in_precision
from hiplora.errors import AdapterError
from hiplora.spectral import weight_fingerprint
from tests.tiny import save_tiny, tiny_llama
from tests.unit.adapters.samples import base_model, save_tiny_gpt2


def linear_layers(model):
    return {name: m.weight for name, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}


def test_every_weight_is_the_loaded_models(tiny_model_dir):
    weights = BaseWeights(str(tiny_model_dir))
    layers = linear_layers(base_model(tiny_model_dir))
    assert len(layers) == 15
    for name, weight in layers.items():
        assert torch.equal(weights.weight(name), weight)


def test_weights_are_read_without_loading_the_model(tiny_model_dir, monkeypatch):
    weights = BaseWeights(str(tiny_model_dir))
    monkeypatch.setattr(BaseWeights, "_load", lambda self: pytest.fail("the whole model was loaded"))
    assert weights.weight("model.layers.1.mlp.down_proj").shape == (64, 96)


def test_weights_of_a_sharded_checkpoint_are_found(tmp_path, monkeypatch):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "m", max_shard_size="50KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    weights = BaseWeights(str(tmp_path / "m"))
    monkeypatch.setattr(BaseWeights, "_load", lambda self: pytest.fail("the whole model was loaded"))
    for name, weight in linear_layers(model).items():
        assert torch.equal(weights.weight(name), weight)


def test_a_tied_output_head_is_the_embeddings(tmp_path):
    base = save_tiny(tmp_path / "tied", tie=True)
    weight = BaseWeights(str(base)).weight("lm_head")
    assert torch.equal(weight, base_model(base).model.embed_tokens.weight)


def test_transposed_weights_come_as_out_by_in(tmp_path):
    base = save_tiny_gpt2(tmp_path / "gpt2")
    weights = BaseWeights(str(base))
    for name, weight in linear_layers(base_model(base)).items():
        expected = weight if name == "lm_head" else weight.T
        assert torch.equal(weights.weight(name), expected)


def test_stored_number_formats_are_kept(tmp_path):
    base = save_tiny(tmp_path / "bf16", dtype=torch.bfloat16)
    assert BaseWeights(str(base)).weight("lm_head").dtype == torch.bfloat16


def test_a_layer_that_the_model_lacks_is_named(tiny_model_dir):
    with pytest.raises(AdapterError, match=r"has no layer model\.layers\.9\.self_attn\.q_proj"):
        BaseWeights(str(tiny_model_dir)).weight("model.layers.9.self_attn.q_proj")


def test_a_model_that_is_not_there_is_named_with_the_way_out(tmp_path):
    with pytest.raises(AdapterError, match=r"nowhere.*--base"):
        BaseWeights(str(tmp_path / "nowhere"))


def test_a_norm_is_no_matrix(tiny_model_dir):
    with pytest.raises(AdapterError, match="not a matrix"):
        BaseWeights(str(tiny_model_dir)).weight("model.norm")


def test_a_weight_is_recognised_in_the_precision_that_the_adapter_saw():
    weight = torch.randn(8, 6)
    rounded = weight.bfloat16()
    assert torch.equal(in_precision(weight, weight_fingerprint(weight), "float32"), weight)
    assert torch.equal(in_precision(rounded, weight_fingerprint(rounded.float()), "float32"), rounded)
    assert torch.equal(in_precision(weight, weight_fingerprint(rounded), "bfloat16"), rounded)
    assert in_precision(weight, weight_fingerprint(rounded), "float32") is None
    assert in_precision(weight, weight_fingerprint(rounded), "bitsandbytes") is None
    assert in_precision(weight + 1, weight_fingerprint(weight), "float32") is None
