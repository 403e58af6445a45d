"""The shape of a model is read from its configuration; what methods train on it is counted as PEFT counts."""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, T5Config

from hiplora.errors import ConfigError
from hiplora.models import shapes
from hiplora.models.shapes import model_shape, shape_of
from hiplora.spectral import resolve_rank
from hiplora.training.methods import METHODS
from tests.tiny import tiny_llama

PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
}


def settings(name, **values):
    return METHODS[name](**values).model_dump()


@pytest.fixture
def tiny(tiny_model_dir):
    return model_shape(str(tiny_model_dir))


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_known_models_have_their_published_number_of_parameters_without_a_hub(name, count):
    assert model_shape(name).parameters == count


def test_sizes_of_the_8b_model():
    shape = model_shape("meta-llama/Llama-3.1-8B")
    assert (shape.hidden, shape.layers, shape.vocabulary, shape.intermediate) == (4096, 32, 128256, 14336)
    assert (shape.heads, shape.kv_heads, shape.head_size) == (32, 8, 128)
    assert shape.modules["model.layers.31.self_attn.k_proj"] == (1024, 4096)
    assert shape.modules["lm_head"] == (128256, 4096)


def test_an_instruction_tuned_model_has_the_shape_of_its_base():
    assert model_shape("meta-llama/Llama-3.2-1B-Instruct") == model_shape("meta-llama/Llama-3.2-1B")


@pytest.mark.real_model
def test_the_facts_in_the_package_are_those_of_the_real_model(smollm2):
    assert model_shape(str(smollm2)) == model_shape("smollm2-135m")


def test_parameters_are_embeddings_linear_layers_and_norms(tiny):
    norms = 64 * (2 * 2 + 1)
    assert tiny.parameters == tiny.embedding_parameters + tiny.linear_parameters + norms
    assert tiny.embedding_parameters == 2 * 259 * 64
    assert tiny.head == "lm_head"


def test_tied_embeddings_count_once():
    shape = shape_of(tiny_llama(tie=True).config)
    assert shape.embedding_parameters == 259 * 64
    assert shape.parameters == tiny_llama(tie=True).num_parameters()


def test_no_tensor_of_the_model_has_storage(monkeypatch):
    made = []

    def spy(config):
        made.append(build(config))
        return made[-1]

    build = AutoModelForCausalLM.from_config
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", spy)
    shape_of(tiny_llama().config)
    (model,) = made
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.empty(0).device.type == "cpu"


def test_layers_stored_the_other_way_round_are_linear_layers_too():
    shape = shape_of(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=16))
    assert shape.modules["transformer.h.0.attn.c_attn"] == (24, 8)
    assert shape.kv_heads == 2
    assert shape.intermediate == 32


CASES = [
    ("adalora", {"r": 2}),
    ("adalora", {"r": 2, "init_r": 7, "target_modules": "all-linear"}),
    ("lora", {}),
    ("lora", {"r": 4, "target_modules": "all-linear"}),
    ("lora", {"r": 4, "rank_pattern": {"k_proj": 2, "layers.1.self_attn.q_proj": 3}}),
    ("lora", {"r": 4, "layers_to_transform": [1], "exclude_modules": ["v_proj"]}),
    ("lora", {"r": 4, "target_modules": r".*\.1\.mlp\.(up|down)_proj"}),
    ("lora", {"r": 4, "modules_to_save": ["embed_tokens"]}),
    ("pissa", {"r": 4}),
    ("milora", {"r": 4, "rank_pattern": {"k_proj": 2}}),
    ("lora_null", {"r": 4}),
    ("proj_lora", {"r": 4, "preset": "paper", "principal_rank": 5}),
    ("hiplora", {"r": 4, "preset": "paper", "principal_rank": 5}),
    (
        "hiplora",
        {"r": 4, "preset": "paper", "principal_rank": 0.2, "principal_rank_pattern": {"k_proj": 7}},
    ),
    ("hiplora", {"r": 4, "preset": "paper", "principal_channel": True, "target_modules": ["down_proj"]}),
]


@pytest.mark.parametrize(("name", "values"), CASES)
def test_trainable_parameters_are_those_of_the_adapter_itself(tiny, name, values):
    method = METHODS[name](**values)
    model = get_peft_model(tiny_llama(), method.peft_config(40))
    real = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert tiny.trainable(settings(name, **values)) == real


def test_factor_scalars_are_those_of_the_factors_themselves(tiny):
    method = METHODS["hiplora"](preset="paper", principal_rank=5, principal_rank_pattern={"k_proj": 7})
    model = get_peft_model(tiny_llama(), method.peft_config())
    real = sum(buffer.numel() for name, buffer in model.named_buffers() if "hiplora_" in name)
    assert tiny.factor_scalars(method.model_dump()) == real


@pytest.mark.parametrize("name", ["lora", "pissa", "milora", "corda", "lora_null"])
def test_methods_without_factors_have_no_factor_scalars(tiny, name):
    assert tiny.factor_scalars(settings(name)) == 0


@pytest.mark.parametrize("rank", [1, 7, 0.1, 0.999, 0.001])
def test_a_principal_rank_is_resolved_as_the_tuner_does(tiny, rank):
    ranks = tiny.principal_ranks(settings("hiplora", preset="paper", principal_rank=rank))
    assert ranks == {name: resolve_rank(rank, tiny.modules[name], lambda: None) for name in ranks}


def test_a_rank_by_energy_counts_as_the_largest_that_it_may_become(tiny):
    values = settings("hiplora", preset="paper", principal_rank="energy:0.999999")
    flat = {
        name: resolve_rank("energy:0.999999", tiny.modules[name], lambda: torch.ones(64))
        for name in tiny.principal_ranks(values)
    }
    assert tiny.principal_ranks(values) == flat


def test_a_principal_rank_beyond_a_layer_is_refused_with_its_name(tiny):
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.k_proj: principal_rank 40 exceeds .* = 32"):
        tiny.factor_scalars(settings("hiplora", preset="paper", principal_rank=40))


def test_targets_that_match_nothing_are_refused_with_what_there_is(tiny):
    with pytest.raises(ConfigError, match=r"'c_attn'.* it has down_proj, gate_proj"):
        tiny.trainable(settings("lora", target_modules=["c_attn"]))


def test_a_missing_setting_is_named(tiny):
    with pytest.raises(ConfigError, match=r"`target_modules` is missing; pass the whole method"):
        tiny.trainable({"name": "lora", "r": 4})


def test_an_unknown_model_without_a_hub_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"model some-one/some-model: .* one of .*meta-llama/Llama-3\.1-8B"):
        model_shape("some-one/some-model")


def test_known_models_ask_neither_hub_nor_cache(monkeypatch):
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_: pytest.fail("asked"))
    shapes.model_shape.cache_clear()
    assert model_shape("smollm2-135m").layers == 30


def test_a_folder_wins_over_a_known_name(tiny_model_dir, tmp_path, monkeypatch):
    (tmp_path / "smollm2-135m").symlink_to(tiny_model_dir)
    monkeypatch.chdir(tmp_path)
    shapes.model_shape.cache_clear()
    assert model_shape("smollm2-135m").hidden == 64
    shapes.model_shape.cache_clear()


def test_a_model_that_is_not_a_causal_language_model_is_refused(tmp_path):
    T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is not a causal language model"):
        model_shape(str(tmp_path))
