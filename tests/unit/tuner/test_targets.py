"""The projections of a preset are found by their role, whatever the architecture calls them."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hiplora import HipLoraConfig
from hiplora.errors import ConfigError
from hiplora.tuner import PRESETS, default_targets, find_targets, hip_layers
from hiplora.tuner.targets import left_out
from tests.models.zoo import CASES, Case
from tests.tiny import tiny_llama

GATED, QKVO = "gate_proj up_proj down_proj", "q_proj k_proj v_proj o_proj"
# architecture → its MLP's projections, its attention's
ROLES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "olmo2", "stablelm"), (GATED, QKVO)),
    "phi": ("fc1 fc2", "q_proj k_proj v_proj dense"),
    "phi3": ("gate_up_proj down_proj", "qkv_proj o_proj"),
    "glm": ("gate_up_proj down_proj", QKVO),
    "starcoder2": ("c_fc c_proj", QKVO),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_fc mlp.c_proj", "c_attn attn.c_proj")),
    **dict.fromkeys(("gpt_neox", "bloom", "falcon"), ("dense_h_to_4h dense_4h_to_h", "query_key_value dense")),
    "gptj": ("fc_in fc_out", "q_proj k_proj v_proj out_proj"),
    "gpt_neo": ("c_fc c_proj", "q_proj k_proj v_proj out_proj"),
    "opt": ("fc1 fc2", "q_proj k_proj v_proj out_proj"),
    "mpt": ("up_proj down_proj", "Wqkv out_proj"),
    "bert": ("intermediate.dense 0.output.dense 1.output.dense", "query key value attention.output.dense"),
    "distilbert": ("lin1 lin2", "q_lin k_lin v_lin out_lin"),
    "modernbert": ("Wi mlp.Wo", "Wqkv attn.Wo"),
    "t5": ("wi wo", "q k v o"),
    "mixtral": ("gate_up_proj down_proj", QKVO),
    "qwen2_moe": (f"gate_up_proj {GATED}", QKVO),
    "gpt_oss": ("gate_up_proj down_proj", QKVO),
    "nemotron_h": ("up_proj down_proj", QKVO),
}
LLAMA_4 = Case("Llama 4", "experts", "llama4_text", {"num_local_experts": 4})
CASE = {case.kind: case for case in reversed([*CASES, LLAMA_4])}


def skeleton(kind):
    with torch.device("meta"):
        return CASE[kind].make()


def names_of(model, config):
    return [target.name for target in find_targets(model, config)]


@pytest.mark.parametrize("kind", ROLES)
def test_the_projections_are_found_by_role(kind):
    model, config = skeleton(kind), HipLoraConfig()
    assert [set(default_targets(model, preset)) for preset in PRESETS] == [set(names.split()) for names in ROLES[kind]]
    assert not any(re.search(r"attention\.|attn|head|\.gate$|expert_gate", name) for name in names_of(model, config))


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
    model = skeleton(kind)
    config = HipLoraConfig(principal_rank=4, **changes)
    notes = left_out(model, config, find_targets(model, config))
    if expected is None:
        assert not notes
    else:
        assert re.search(expected, " ".join(notes))


def test_what_fused_kernels_read_without_a_call_is_refused_and_left_out_where_blocks_have_no_mlp_or_attention():
    model = skeleton("mamba")
    assert default_targets(model) == default_targets(model, "paper") == ["in_proj"]
    with pytest.raises(ConfigError, match=r"layers\.0\.mixer\.out_proj: .*never call"):
        find_targets(model, HipLoraConfig(target_modules=["in_proj", "out_proj"]))
    names = names_of(model, HipLoraConfig(target_modules="all-linear", principal_rank=4))
    assert all(name.endswith("in_proj") for name in names)


def test_the_choice_is_the_same_on_an_adapted_model():
    base = tiny_llama()
    before = names_of(base, HipLoraConfig())
    config = HipLoraConfig(preset="paper", r=2, principal_rank=4, target_modules=["up_proj", "q_proj"])
    get_peft_model(base, config)
    assert names_of(base, HipLoraConfig()) == before
    assert len(find_targets(base, HipLoraConfig(target_modules="all-linear", principal_rank=4))) == 14


def test_any_method_of_peft_can_be_asked_and_targets_that_match_nothing_are_refused():
    (target,) = find_targets(tiny_llama(), LoraConfig(target_modules=["v_proj"], layers_to_transform=[1]))
    assert (target.name, target.shape) == ("model.layers.1.self_attn.v_proj", (32, 64))
    for targets in (["nothing"], "*_proj"):
        with pytest.raises(ConfigError, match="target_modules"):
            find_targets(tiny_llama(), HipLoraConfig(target_modules=targets))


@pytest.mark.parametrize(
    ("excluded", "left"),
    [
        (["experts.gate_up_proj"], {"down_proj"}),
        (["w1"], {"down_proj"}),
        (["experts.down_proj"], {"gate_up_proj"}),
        (r".*experts\.w2", {"gate_up_proj"}),
    ],
)
def test_experts_are_excluded_by_any_of_their_names(excluded, left):
    targets = {"target_modules": ["gate_proj", "up_proj", "down_proj"], "exclude_modules": excluded}
    names = names_of(skeleton("mixtral"), HipLoraConfig(**targets))
    assert {name.split(".")[-2] for name in names} == left


def test_a_pattern_means_all_experts_of_a_list():
    settings = {"preset": "paper", "r": 2, "principal_rank": 4, "target_modules": ["gate_up_proj", "down_proj"]}
    patterns = {"rank_pattern": {"down_proj": 3}, "principal_rank_pattern": {"w1": 5, r"layers\.0.*down_proj": 6}}
    adapted = get_peft_model(CASE["mixtral"].make(), HipLoraConfig(**settings, **patterns))
    ranks = {name: (layer.r["default"], len(layer.hiplora_sigma["default"])) for name, layer in hip_layers(adapted)}
    assert {(r, k) for name, (r, k) in ranks.items() if "gate_up_proj" in name} == {(2, 5)}
    assert {(r, k) for name, (r, k) in ranks.items() if "down_proj" in name and "layers.0." in name} == {(3, 6)}
    assert {(r, k) for name, (r, k) in ranks.items() if "down_proj" in name and "layers.1." in name} == {(3, 4)}
