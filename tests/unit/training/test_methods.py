"""A method is one file: every setting reaches PEFT's configuration, and methods are what they are called."""

import peft
import pytest
import torch

from hiplora.errors import ConfigError
from hiplora.training.adapt import fitting_config, put_on
from hiplora.training.baselines import METHODS
from hiplora.tuner import find_targets
from tests.models.zoo import CASE
from tests.tiny import tiny_llama, tiny_tokenizer

# A value other than the default for every field of PEFT's.
LOW_RANK = {
    "r": 3, "lora_alpha": 7, "lora_dropout": 0.25, "target_modules": ["up_proj"], "exclude_modules": ["down_proj"],
    "layers_to_transform": [1], "layers_pattern": "layers", "modules_to_save": ["lm_head"],
}  # fmt: skip
PATTERNS = {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 5.0}}
SPECTRAL = {
    "principal_rank": 9, "principal_rank_pattern": {"up_proj": 4}, "basis": "weight", "svd_tolerance": 1e-3,
    "basis_sides": "input", "save_factors": False, "projection": "hard", "gradient_projection": False,
}  # fmt: skip
GAINS = {
    "principal_channel": True, "gain_lr_ratio": 3.0, "relative_gains": True, "stability_weight": 0.5,
    "stability_gamma": 0.0, "stability_mode": "proximal", "init_weights": "zero",
}  # fmt: skip
SCHEDULE = {"init_r": 9, "tinit": 3, "tfinal": 4, "deltaT": 2, "beta1": 0.5, "beta2": 0.75, "orth_reg_weight": 0.25}
CHANGED = {
    "adalora": LOW_RANK | SCHEDULE,
    "osf": {"target_modules": ["up_proj"], "effective_rank": 5, "rank_pattern": {"up_proj": 2}},
    "hiplora": LOW_RANK | PATTERNS | SPECTRAL | GAINS,
    "proj_lora": LOW_RANK | PATTERNS | SPECTRAL,
}
OWN = {"name", "preset", "calibration_text", "calibration_tokens", "clients", "cut_layer", "average_every"}


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_reaches_the_adapter(name):
    changed = CHANGED.get(name, LOW_RANK | PATTERNS)
    elsewhere = {"hiplora": {"residual_projection"}, "adalora": {*PATTERNS}}  # without a gradient to project; refused
    assert changed.keys() == METHODS[name].model_fields.keys() - OWN - elsewhere.get(name, set())
    config = METHODS[name](**changed).peft_config(100)
    for key, value in changed.items():
        configured = getattr(config, "target_r" if (name, key) == ("adalora", "r") else key)
        assert (sorted(configured) if isinstance(configured, set) else configured) == value, key


def test_settings_that_exclude_those():
    assert not METHODS["hiplora"](residual_projection=False, principal_channel=True).peft_config().residual_projection
    with pytest.raises(ConfigError, match="prunes its ranks while it trains"):
        METHODS["adalora"]().peft_config()


@pytest.mark.parametrize("name", [name for name in METHODS if name != "osf"])
def test_a_rank_above_the_weights_is_refused_before_anything_is_made(name):
    with pytest.raises(ConfigError, match=r"r \d+ exceeds min\(out, in\) = \d+"):
        put_on(METHODS[name](r=50_000_000), tiny_llama(), tiny_tokenizer(), seed=0, steps=100)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("osf", {"effective_rank": 64}, r"layer .*: effective_rank 64 .* leaves none to train"),
        ("osf", {"rank_pattern": {"v_proj": 10_000}}, r"layer .*v_proj: effective_rank 10000"),
        ("osf", {"rank_pattern": {"zzz": 2}}, "rank_pattern 'zzz' matches no adapted layer"),
        ("hiplora", {"r": 1, "principal_rank": 64}, r"principal_rank 64 and r 1 do not fit into its min\(out, in\)"),
        ("proj_lora", {"r": 33, "principal_rank": 0.5}, "principal_rank 32 and r 33 do not fit"),
        ("hiplora", {"principal_rank_pattern": {"1.mlp.up_proj": 60}}, "layers.1.mlp.up_proj: principal_rank 60"),
        ("hiplora", {"principal_rank_pattern": {"zzz": 3}}, "principal_rank_pattern 'zzz' matches no adapted layer"),
        ("lora", {"rank_pattern": {"up_proj": 3}}, "rank_pattern 'up_proj' matches no adapted layer"),
        ("pissa", {"alpha_pattern": {"zzz": 3.0}}, "alpha_pattern 'zzz' matches no adapted layer"),
        ("lora", {"modules_to_save": ["lm_head", "zzz"]}, "modules_to_save 'zzz' matches no module of Llama"),
        ("lora", {"exclude_modules": ["k_proj", "zzz"]}, "exclude_modules 'zzz' matches no module"),
        ("lora", {"target_modules": ["q_proj", "zzz"]}, "target_modules 'zzz' matches no module"),
        ("lora", {"layers_to_transform": [0, 99]}, "layers_to_transform 99 matches no adapted layer"),
        ("lora", {"target_modules": ["lm_head"]}, "layer lm_head: the training reads the output head's weight"),
        ("lora", {"target_modules": "["}, r"target_modules '\[' is no regular expression"),
        ("lora", {"target_modules": "([a-z._0-9]+)+X"}, "takes over 1 s to match"),
    ],
)
def test_what_does_not_fit_the_model_is_found_without_its_weights(name, settings, said, monkeypatch):
    monkeypatch.setattr("hiplora.tuner.patterns.MATCH_SECONDS", 1)
    with torch.device("meta"), pytest.raises(ConfigError, match=said):
        fitting_config(METHODS[name](**settings), tiny_llama())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("lora", {"target_modules": ["embed_tokens", "q_proj"]}),
        ("lora", {"target_modules": r".*1\..*_proj", "modules_to_save": ["lm_head"], "exclude_modules": ["up_proj"]}),
        ("osf", {"rank_pattern": {"self_attn": 2, "^model": 3}}),
        ("hiplora", {"r": 32, "principal_rank": 32}),
        ("hiplora", {"r": 60, "principal_rank": 32, "projection": "soft"}),
        ("hiplora", {"principal_rank": "energy:0.99", "r": 60}),
    ],
)
def test_what_fits_is_taken(name, settings):
    fitting_config(METHODS[name](**settings), tiny_llama())


@pytest.mark.parametrize("name", ["hiplora", "lora", "adalora", "osf"])
def test_all_linear_leaves_out_what_a_state_space_model_never_calls(name):
    model = CASE["Mamba"].make()
    ranks = {"osf": {"effective_rank": 8}, "adalora": {}, "lora": {"r": 2}, "hiplora": {"r": 2, "principal_rank": 4}}[
        name
    ]
    config = fitting_config(METHODS[name](target_modules="all-linear", **ranks), model, steps=10**9)
    assert {target.name.rpartition(".")[2] for target in find_targets(model, config)} == {"in_proj"}
    if name == "lora":
        peft.get_peft_model(model, config)
