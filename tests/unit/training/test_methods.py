"""A method is one file: every setting reaches PEFT's configuration, and methods are what they are called."""

import pytest

from hiplora.errors import ConfigError
from hiplora.training.adapt import put_on
from hiplora.training.baselines import METHODS
from hiplora.tuner import HipLoraConfig
from tests.tiny import tiny_llama, tiny_tokenizer

CHANGED = {
    "r": 3,
    "lora_alpha": 7,
    "lora_dropout": 0.25,
    "target_modules": ["up_proj"],
    "exclude_modules": ["down_proj"],
    "layers_to_transform": [1],
    "layers_pattern": "layers",
    "rank_pattern": {"up_proj": 2},
    "alpha_pattern": {"up_proj": 5.0},
    "modules_to_save": ["lm_head"],
    "principal_rank": 9,
    "principal_rank_pattern": {"up_proj": 4},
    "basis": "weight",
    "svd_tolerance": 1e-3,
    "basis_sides": "input",
    "save_factors": False,
    "projection": "hard",
    "gain_lr_ratio": 3.0,
    "relative_gains": True,
    "stability_weight": 0.5,
    "stability_gamma": 0.0,
    "stability_mode": "proximal",
    "gradient_projection": False,
    "residual_projection": False,
    "init_weights": "zero",
    "principal_channel": True,
    "effective_rank": 5,
    "init_r": 9,
    "tinit": 3,
    "tfinal": 4,
    "deltaT": 2,
    "beta1": 0.5,
    "beta2": 0.75,
    "orth_reg_weight": 0.25,
}


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_reaches_the_adapter(name):
    own = {"name", "preset", "calibration_text", "calibration_tokens", "clients", "cut_layer", "average_every"}
    wanted = {key: CHANGED[key] for key in METHODS[name].model_fields.keys() - own}
    if name == "hiplora":
        del wanted["residual_projection"]  # which False leaves no gradient to project
        assert not METHODS[name](residual_projection=False, principal_channel=True).peft_config().residual_projection
    if name == "adalora":
        wanted = {key: value for key, value in wanted.items() if not key.endswith("_pattern")}
    config = METHODS[name](**wanted).peft_config(100)
    if name == "adalora":
        wanted["target_r"] = wanted.pop("r")
        with pytest.raises(ConfigError, match="prunes its ranks while it trains"):
            METHODS[name]().peft_config()
    for key, value in wanted.items():
        given = getattr(config, key)
        assert (sorted(given) if isinstance(given, set) else given) == value, key


def test_the_activation_basis_is_measured_and_the_model_keeps_its_modes():
    model = tiny_llama().train()
    method = METHODS["hiplora"](principal_rank=4, calibration_tokens=600)
    adapted = put_on(method, model, tiny_tokenizer(), seed=0)
    config = adapted.peft_config["default"]
    assert isinstance(config, HipLoraConfig)
    assert config.calibration
    assert all(module.training for module in model.modules())


def test_modules_that_the_model_does_not_have_are_named():
    for name in ("lora", "hiplora", "milora"):
        with pytest.raises(ConfigError, match=r"check method\.target_modules"):
            put_on(METHODS[name](target_modules=["nowhere"]), tiny_llama(), tiny_tokenizer(), seed=0)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "osf"])
def test_a_rank_above_the_weights_is_refused_before_anything_is_made(name):
    with pytest.raises(ConfigError, match=r"r \d+ exceeds min\(out, in\) = \d+"):
        put_on(METHODS[name](r=50_000_000), tiny_llama(), tiny_tokenizer(), seed=0, steps=100)
