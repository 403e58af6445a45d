"""The projections of a preset are found by their role, whatever the architecture calls them."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hiplora import HipLoraConfig
from hiplora.errors import ConfigError
from hiplora.tuner import default_targets, find_targets
from hiplora.tuner.experts import unrolled
from hiplora.tuner.targets import left_out
from tests.tiny import tiny_llama

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
GATED = {"gate_proj", "up_proj", "down_proj"}
QKVO = {"q_proj", "k_proj", "v_proj", "o_proj"}

# model type → its MLP's projections, its attention's, other settings
CAUSAL = {
    "llama": (GATED, QKVO, {}),
    "mistral": (GATED, QKVO, {}),
    "qwen2": (GATED, QKVO, {}),
    "qwen3": (GATED, QKVO, {}),
    "gemma3_text": (GATED, QKVO, {}),
    "olmo2": (GATED, QKVO, {}),
    "phi": ({"fc1", "fc2"}, {"q_proj", "k_proj", "v_proj", "dense"}, {}),
    "phi3": ({"gate_up_proj", "down_proj"}, {"qkv_proj", "o_proj"}, {"pad_token_id": 0}),
    "glm": ({"gate_up_proj", "down_proj"}, QKVO, {"pad_token_id": 0}),
    "starcoder2": ({"c_fc", "c_proj"}, QKVO, {}),
    "stablelm": (GATED, QKVO, {}),
    "gpt2": ({"c_fc", "mlp.c_proj"}, {"c_attn", "attn.c_proj"}, {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "gpt_bigcode": (
        {"c_fc", "mlp.c_proj"},
        {"c_attn", "attn.c_proj"},
        {"n_embd": 32, "n_layer": 2, "n_head": 4},
    ),
    "gpt_neox": ({"dense_h_to_4h", "dense_4h_to_h"}, {"query_key_value", "dense"}, {}),
    "gptj": (
        {"fc_in", "fc_out"},
        {"q_proj", "k_proj", "v_proj", "out_proj"},
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    ),
    "gpt_neo": (
        {"c_fc", "c_proj"},
        {"q_proj", "k_proj", "v_proj", "out_proj"},
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]},
    ),
    "opt": (
        {"fc1", "fc2"},
        {"q_proj", "k_proj", "v_proj", "out_proj"},
        {"ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    "bloom": ({"dense_h_to_4h", "dense_4h_to_h"}, {"query_key_value", "dense"}, {"n_layer": 2, "n_head": 4}),
    "falcon": ({"dense_h_to_4h", "dense_4h_to_h"}, {"query_key_value", "dense"}, {}),
    "mpt": (
        {"up_proj", "down_proj"},
        {"Wqkv", "out_proj"},
        {"d_model": 32, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2},
    ),
}
ENCODERS = {
    "bert": ({"intermediate.dense"}, {"query", "key", "value", "attention.output.dense"}, {}),
    "distilbert": (
        {"lin1", "lin2"},
        {"q_lin", "k_lin", "v_lin", "out_lin"},
        {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    ),
    "modernbert": ({"Wi", "mlp.Wo"}, {"Wqkv", "attn.Wo"}, {"pad_token_id": 0}),
    "t5": (
        {"wi", "wo"},
        {"q", "k", "v", "o"},
        {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4},
    ),
}


def skeleton(kind, settings, auto):
    with torch.device("meta"):
        return auto.from_config(AutoConfig.for_model(kind, **{**SMALL, **settings}))


def kinds(names):
    return {name.rpartition(".")[2] for name in names}


@pytest.mark.parametrize("kind", CAUSAL)
def test_the_projections_of_a_decoder_are_found_by_role(kind):
    mlp, attention, settings = CAUSAL[kind]
    model = skeleton(kind, settings, AutoModelForCausalLM)
    assert set(default_targets(model)) == mlp
    assert set(default_targets(model, "paper")) == attention
    found = [target.name for target in find_targets(model, HipLoraConfig())]
    assert len(found) == 2 * len(mlp)
    assert not any("attn" in name or "attention" in name or "head" in name for name in found)


@pytest.mark.parametrize("kind", ENCODERS)
def test_the_projections_of_an_encoder_are_found_by_role(kind):
    mlp, attention, settings = ENCODERS[kind]
    model = skeleton(kind, settings, AutoModel)
    assert mlp <= set(default_targets(model))
    found = [target.name for target in find_targets(model, HipLoraConfig())]
    assert not any("attention" in name.lower() or "attn" in name for name in found)
    assert attention == set(default_targets(model, "paper"))


def test_routers_and_shared_experts_gates_are_left_alone():
    settings = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    model = skeleton("qwen2_moe", settings, AutoModelForCausalLM)
    names = [target.name for target in find_targets(model, HipLoraConfig())]
    assert names
    assert not any(name.endswith((".gate", "shared_expert_gate")) for name in names)


# model type → its MLP's projections, other settings
MIXTURES = {
    "mixtral": ({"gate_up_proj", "down_proj"}, {"num_local_experts": 4, "head_dim": 8}),
    "qwen2_moe": (
        {"gate_up_proj", "down_proj", "gate_proj", "up_proj"},
        {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    "gpt_oss": ({"gate_up_proj", "down_proj"}, {"num_local_experts": 4, "head_dim": 8, "num_experts_per_tok": 2}),
    "nemotron_h": (
        {"up_proj", "down_proj"},
        {
            "layers_block_type": ["attention", "moe"],
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
            "head_dim": 8,
        },
    ),
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_are_adapted_one_by_one(kind):
    """Unrolled they compute the same; adapted, merged and unloaded they are the 3-D parameters again."""
    targets, settings = MIXTURES[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **settings})).eval()
    for parameter in model.parameters():  # some architectures leave them as they were allocated
        torch.nn.init.normal_(parameter, std=0.2)
    names, ids = dict(model.named_parameters()), torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with unrolled(model):
            torch.testing.assert_close(model(input_ids=ids).logits, before)
    assert all(names[name] is parameter for name, parameter in model.named_parameters())
    assert set(default_targets(model)) == targets
    config = HipLoraConfig(preset="paper", r=2, principal_rank=4, target_modules=default_targets(model))
    adapted = get_peft_model(model, HipLoraConfig(**{**config.to_dict(), "init_weights": False})).eval()
    with torch.no_grad():
        changed = adapted(input_ids=ids).logits
        assert not torch.allclose(changed, before, atol=1e-3)
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted(input_ids=ids).logits, before)
        merged = adapted.merge_and_unload()
        assert {name: p.shape for name, p in merged.named_parameters()} == {n: p.shape for n, p in names.items()}
        torch.testing.assert_close(merged(input_ids=ids).logits, changed, rtol=1e-3, atol=1e-4)


NOTES = {
    "names of other architectures": (
        "phi3",
        {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
        r"\['gate_proj', 'up_proj'\] match no module .* MLP projections, these are left out: .*gate_up_proj \(\d+\.\d%",
    ),
    "experts of another kind": ("llama4_text", {}, r"cannot adapt .* left out: .*experts\.gate_up_proj"),
    "narrow layers": ("qwen2_moe", {"target_modules": "all-linear"}, r"'all-linear' leaves out .*shared_expert_gate"),
    "a usual choice": ("llama", {"target_modules": ["q_proj", "v_proj"]}, None),
    "the default": ("qwen2_moe", {}, None),
}


@pytest.mark.parametrize("case", NOTES)
def test_what_is_left_out_is_named_with_its_share(case):
    kind, changes, expected = NOTES[case]
    settings = {"num_local_experts": 4, "head_dim": 8} if kind == "llama4_text" else MIXTURES.get(kind, (0, {}))[1]
    model = skeleton(kind, {**settings, "pad_token_id": 0}, AutoModelForCausalLM)
    config = HipLoraConfig(principal_rank=4, **changes)
    notes = left_out(model, config, find_targets(model, config))
    if expected is None:
        assert not notes
    else:
        assert re.search(expected, " ".join(notes))


def test_a_model_without_an_mlp_asks_for_targets():
    model = skeleton("mamba", {"state_size": 4}, AutoModelForCausalLM)
    with pytest.raises(ConfigError, match=r"no MLP projections .* MambaForCausalLM; set it to a list"):
        default_targets(model)


def test_what_fused_kernels_read_without_a_call_is_refused():
    model = skeleton("mamba", {"state_size": 4}, AutoModelForCausalLM)
    with pytest.raises(ConfigError, match=r"layers\.0\.mixer\.out_proj: .*never call"):
        find_targets(model, HipLoraConfig(target_modules=["in_proj", "out_proj"]))
    names = [
        target.name for target in find_targets(model, HipLoraConfig(target_modules="all-linear", principal_rank=4))
    ]
    assert all(name.endswith("in_proj") for name in names)


def test_the_choice_is_the_same_on_an_adapted_model():
    base = tiny_llama()
    before = [target.name for target in find_targets(base, HipLoraConfig())]
    config = HipLoraConfig(preset="paper", r=2, principal_rank=4, target_modules=["up_proj", "q_proj"])
    get_peft_model(base, config)
    assert [target.name for target in find_targets(base, HipLoraConfig())] == before
    assert len(find_targets(base, HipLoraConfig(target_modules="all-linear", principal_rank=4))) == 14


def test_any_method_of_peft_can_be_asked():
    found = find_targets(tiny_llama(), LoraConfig(target_modules=["v_proj"], layers_to_transform=[1]))
    assert [target.name for target in found] == ["model.layers.1.self_attn.v_proj"]
    assert found[0].shape == (32, 64)


@pytest.mark.parametrize("targets", [["nothing"], "*_proj"])
def test_targets_that_match_nothing_are_refused(targets):
    with pytest.raises(ConfigError, match="target_modules"):
        find_targets(tiny_llama(), HipLoraConfig(target_modules=targets))
