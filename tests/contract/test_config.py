"""Every field of the config does something, and nothing is accepted that makes no sense."""

import dataclasses
import json

import peft
import pytest
import torch
from peft.utils.peft_types import TaskType

import hiplora
from hiplora import HipLoraConfig
from hiplora.errors import AdapterError, ConfigError, FactorError
from hiplora.spectral import FactorStore
from hiplora.training.baselines.hiplora import HipLoraMethod
from hiplora.tuner import HipLoraLinear, hip_layers
from tests.calls import watch
from tests.contract.conftest import logits, train
from tests.models.zoo import CASE

Q0 = "model.layers.0.self_attn.q_proj"
Q1 = "model.layers.1.self_attn.q_proj"


def modules(model):
    return {name for name, _ in hip_layers(model)}


def layer(model, name=Q0):
    return dict(hip_layers(model))[name]


def trained_state(tiny, ids, **changes):
    torch.manual_seed(0)
    model = tiny.trained(ids, **{"init_weights": False, **changes})
    return {n: p.detach() for n, p in model.named_parameters() if "hiplora_" in n}


def differs(tiny, ids, one, other):
    a, b = trained_state(tiny, ids, **one), trained_state(tiny, ids, **other)
    return any(not torch.equal(a[name], b[name]) for name in a)


def _adapted_mixture():
    model = CASE["Mixtral"].make()
    chosen = {"target_parameters": ["experts.down_proj"]}
    return peft.get_peft_model(model, HipLoraConfig(preset="paper", r=2, principal_rank=4, **chosen))


# One demonstration per field that the field has an effect; `test_every_field_is_shown_to_matter` walks them all.
EFFECTS = {
    "preset": lambda t, i: (
        {name.rpartition(".")[2] for name in modules(t.adapted(preset="function-aware"))}
        == {"gate_proj", "up_proj", "down_proj"}
    ),
    "r": lambda t, i: layer(t.adapted(r=3)).hiplora_A["default"].shape[0] == 3,
    "lora_alpha": lambda t, i: layer(t.adapted(r=4, lora_alpha=6)).scaling["default"] == 1.5,
    "lora_dropout": lambda t, i: differs(t, i, {"lora_dropout": 0.0}, {"lora_dropout": 0.5}),
    "target_modules": lambda t, i: modules(t.adapted(target_modules=r".*layers\.1.*q_proj")) == {Q1},
    "target_parameters": lambda t, i: all(".down_proj." in name for name in modules(_adapted_mixture())),
    "exclude_modules": lambda t, i: not any("k_proj" in m for m in modules(t.adapted(exclude_modules=["k_proj"]))),
    "layers_to_transform": lambda t, i: all(".1." in m for m in modules(t.adapted(layers_to_transform=[1]))),
    "layers_pattern": lambda t, i: (
        len(modules(t.adapted(layers_to_transform=[1], layers_pattern="layers"))) == 4
        and _refused(t.adapted, layers_to_transform=[1], layers_pattern="blocks")
    ),
    "rank_pattern": lambda t, i: (
        layer(t.adapted(rank_pattern={r"layers\.0\..*q_proj": 2})).r["default"] == 2
        and layer(t.adapted(rank_pattern={r"layers\.0\..*q_proj": 2}), Q1).r["default"] == 4
    ),
    "alpha_pattern": lambda t, i: (
        layer(t.adapted(r=4, alpha_pattern={"q_proj": 20})).scaling["default"] == 5.0
        and layer(t.adapted(r=4, alpha_pattern={"q_proj": 20}), Q0.replace("q_", "v_")).scaling["default"] == 8.0
    ),
    "principal_rank_pattern": lambda t, i: (
        layer(t.adapted(principal_rank_pattern={Q0: 5})).hiplora_delta["default"].shape == (5,)
        and layer(t.adapted(principal_rank_pattern={Q0: 5}), Q1).hiplora_delta["default"].shape == (8,)
    ),
    "modules_to_save": lambda t, i: any(
        "modules_to_save" in n for n, _ in t.adapted(modules_to_save=["norm"]).named_parameters()
    ),
    "init_weights": lambda t, i: (
        torch.equal(logits(t.adapted(init_weights="zero"), i), logits(t.make(), i))
        and not layer(t.adapted(init_weights="zero")).hiplora_A["default"].any()
        and not torch.equal(logits(t.adapted(init_weights=False), i), logits(t.make(), i))
    ),
    "principal_rank": lambda t, i: layer(t.adapted(principal_rank=3)).hiplora_U["default"].shape[1] == 3,
    "stability_weight": lambda t, i: differs(t, i, {"stability_weight": 0.0}, {"stability_weight": 50.0}),
    "stability_gamma": lambda t, i: differs(
        t, i, *({"stability_weight": 50.0, "stability_gamma": gamma} for gamma in (0.0, 4.0))
    ),
    "stability_mode": lambda t, i: all(
        differs(t, i, *({"stability_weight": 50.0, "stability_mode": mode} for mode in pair))
        for pair in [("gradient", "none"), ("proximal", "none"), ("gradient", "proximal")]
    ),
    "gain_lr_ratio": lambda t, i: differs(t, i, {"gain_lr_ratio": 1.0}, {"gain_lr_ratio": 30.0}),
    "relative_gains": lambda t, i: differs(t, i, {}, {"relative_gains": True, "gain_lr_ratio": 30.0}),
    "principal_ranks": lambda t, i: (
        set(t.adapted(principal_rank=0.25).peft_config["default"].principal_ranks.values()) == {8, 16}
        and t.adapted().peft_config["default"].principal_ranks == {}
    ),
    "residual_projection": lambda t, i: _raw_leak(t.adapted(residual_projection=False)) > 0.05,
    "gradient_projection": lambda t, i: (
        differs(t, i, {}, {"gradient_projection": False})
        and _refused(gradient_projection=False, residual_projection=False)
        and _refused(gradient_projection=False, basis="activation", projection="soft")
    ),
    "principal_channel": lambda t, i: "default" not in layer(t.adapted(principal_channel=False)).hiplora_delta,
    "basis": lambda t, i: (
        _refused(basis="activations")
        and not torch.equal(
            layer(t.adapted(basis="activation")).hiplora_V["default"], layer(t.adapted()).hiplora_V["default"]
        )
    ),
    "basis_sides": lambda t, i: (
        _raw_leak(t.adapted(basis_sides="output")) > 0.05 > 1e-5 > _raw_leak(t.adapted(basis_sides="input"))
    ),
    "projection": lambda t, i: (
        _refused(projection="soft", basis="weight")
        and _raw_leak(t.adapted(basis="activation", projection="soft"))
        > 0.05
        > 1e-5
        > _raw_leak(t.adapted(basis="activation"))
    ),
    "calibration": lambda t, i: t.adapted(basis="activation").peft_config["default"].calibration["source"] == "self",
    "svd_tolerance": lambda t, i: _tolerance_reaches_the_decomposition(t),
    "save_factors": lambda t, i: (
        not any("hiplora_U" in k for k in peft.get_peft_model_state_dict(t.adapted(save_factors=False)))
    ),
    "how_to_load": lambda t, i: "import hiplora" in t.adapted(how_to_load="").peft_config["default"].how_to_load,
    "fingerprints": lambda t, i: set(t.adapted().peft_config["default"].fingerprints) == modules(t.adapted()),
    "weight_samples": lambda t, i: set(t.adapted().peft_config["default"].weight_samples) == modules(t.adapted()),
    "base_precision": lambda t, i: t.adapted().peft_config["default"].base_precision == "float32",
}


def _raw_leak(model):
    one = layer(model)
    inside = one.hiplora_A["default"].detach() @ one.hiplora_V["default"]
    return (inside.norm() / one.hiplora_A["default"].norm()).item()


def _refused(make=HipLoraConfig, **changes):
    with pytest.raises(ConfigError):
        make(**changes)
    return True


def _tolerance_reaches_the_decomposition(tiny):
    with pytest.MonkeyPatch.context() as patch:
        calls = watch(patch, FactorStore, "get_or_compute")
        tiny.adapted(svd_tolerance=3e-5)
    return {tolerance for _, _, _, tolerance in calls} == {3e-5}


@pytest.mark.parametrize("field", EFFECTS)
def test_the_field_has_an_effect(tiny, ids, field):
    assert EFFECTS[field](tiny, ids)


def test_every_field_is_shown_to_matter():
    inherited = {field.name for field in dataclasses.fields(peft.PeftConfig)}
    own = {field.name for field in dataclasses.fields(HipLoraConfig)} - inherited
    assert own == set(EFFECTS)


SENSELESS = {
    "preset": ["best"],
    "r": [0, 2.5, True],
    "lora_alpha": [0, float("nan")],
    "lora_dropout": [1.0, -0.1],
    "principal_rank": [0, "32", 1.0, "energy:1", "energy:most"],
    "gain_lr_ratio": [0],
    "relative_gains": [1],
    "stability_weight": [-1, float("inf")],
    "stability_gamma": [-0.5],
    "stability_mode": ["penalty"],
    "basis": ["weights"],
    "svd_tolerance": [0, 0.5],
    "init_weights": ["gaussian"],
    "residual_projection": ["yes"],
    "save_factors": [1],
    "target_modules": [5],
    "layers_to_transform": ["0"],
    "modules_to_save": ["lm_head"],
    "target_parameters": ["experts.down_proj"],
    "rank_pattern": [{"q_proj": 0}, [1]],
    "alpha_pattern": [{"q_proj": -2}],
    "principal_rank_pattern": [{"q_proj": 1.5}],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in SENSELESS.items() for value in values]
)
def test_a_senseless_value_is_refused_by_name_and_value(field, value):
    shown = next(iter(value.values())) if isinstance(value, dict) else value
    with pytest.raises(ConfigError) as error:
        HipLoraConfig(**{field: value})
    assert field in str(error.value)
    assert repr(shown) in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"residual_projection": False, "principal_channel": False}, "plain LoRA"),
        ({"basis": "activation", "save_factors": False}, "cannot be recomputed from weights"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "layers_to_transform"),
        ({"layers_pattern": "layers"}, "layers_pattern"),
        ({"principal_channel": False, "gain_lr_ratio": 3.0}, "no use with principal_channel=False"),
        ({"principal_channel": False, "stability_weight": 9.0}, "stability_weight is 9.0, which has no use"),
        ({"principal_channel": False, "init_weights": "zero"}, "init_weights is 'zero', which has no use"),
    ],
)
def test_contradictions_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        HipLoraConfig(**fields)


@pytest.mark.parametrize("read", [HipLoraConfig, HipLoraMethod], ids=["python", "recipe"])
@pytest.mark.parametrize(
    ("fields", "gains"),
    [
        ({}, False),
        ({"preset": "paper"}, True),
        ({"stability_weight": 1.0}, True),
        ({"relative_gains": True}, True),
        ({"stability_mode": "none"}, False),
        ({"stability_weight": 0.0, "stability_gamma": 2.0}, False),
        ({"stability_mode": "none", "gain_lr_ratio": 2.0}, True),
        ({"preset": "paper", "principal_channel": False}, False),
    ],
)
def test_an_option_of_the_gains_brings_them(read, fields, gains):
    options = {"name": "hiplora", **fields} if read is HipLoraMethod else fields
    assert read(**options).principal_channel is gains


def test_a_weight_that_cannot_be_factored_is_refused_by_name_and_leaves_the_model_alone(tiny, ids):
    base, model = tiny.make(), tiny.adapted()
    train(model, ids)
    expected, impossible = logits(model, ids), {"principal_rank": 33, "target_modules": ["k_proj"]}
    with pytest.raises(FactorError, match=r"model\.layers\.0\.self_attn\.k_proj.*33.*32"):
        peft.get_peft_model(base, tiny.config(**impossible))
    assert torch.equal(logits(base, ids), logits(tiny.make(), ids))
    assert not any(isinstance(module, HipLoraLinear) for module in base.modules())
    with pytest.raises(FactorError):
        model.add_adapter("second", tiny.config(**impossible))
    assert torch.equal(logits(model, ids), expected)
    assert all(list(one.hiplora_A) == ["default"] for _, one in hip_layers(model))
    with torch.no_grad():
        base.get_submodule(Q1).weight[3, 3] = float("nan")
    with pytest.raises(FactorError, match=Q1.replace(".", r"\.")):
        peft.get_peft_model(base, tiny.config())


@pytest.mark.parametrize("k", [32, 0.99])
def test_a_layer_in_which_nothing_could_learn_is_refused(tiny, k):
    narrow = {"principal_rank": k, "target_modules": ["k_proj"]}  # 32 outputs, 64 inputs
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.k_proj: principal_rank .* all of its 32 outputs"):
        tiny.adapted(**narrow, principal_channel=False)
    with pytest.warns(UserWarning, match="only its gains learn"):
        tiny.adapted(**narrow)
    assert modules(tiny.adapted(**narrow, principal_channel=False, basis_sides="input"))


def test_a_rank_above_what_the_protected_directions_leave_is_warned_of_once(tiny):
    warning = r"r 40 is above the 32 directions that principal_rank 32 leaves \(and so in 1 more\)"
    with pytest.warns(UserWarning, match=warning) as said:
        tiny.adapted(r=40, principal_rank=32, target_modules=["q_proj"], principal_channel=False)
    assert sum("is above the" in str(one.message) for one in said) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["embed_tokens"]}, r"embed_tokens.*modules_to_save"),
        ({"layers_to_transform": [5]}, r"match no module of LlamaForCausalLM in layers_to_transform \[5\]"),
        *(({f"{name}_pattern": {"gate_proj": 2}}, "gate_proj") for name in ("rank", "alpha", "principal_rank")),
    ],
)
def test_what_does_not_fit_the_model_is_refused(tiny, changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny.adapted(**changes)


def test_a_copy_of_a_used_configuration_takes_no_other_layers(tiny):
    used = HipLoraConfig(preset="paper", target_modules=["q_proj"], principal_rank=8)
    peft.get_peft_model(tiny.make(), used)
    with pytest.raises(ConfigError, match=r"is of an adapter on model\.layers\.0\.self_attn\.q_proj"):
        peft.get_peft_model(tiny.make(), dataclasses.replace(used, target_modules=["v_proj"]))


@pytest.mark.parametrize(
    ("given", "preset", "basis", "gains"),
    [
        ({}, "function-aware", "activation", False),
        ({"preset": "paper"}, "paper", "weight", True),
        ({"preset": "paper", "basis": "activation", "principal_channel": False}, "paper", "activation", False),
        # Saved before there were presets: the defaults were the paper's.
        ({"fingerprints": {Q0: "0" * 64}}, "paper", "weight", True),
        ({"fingerprints": {Q0: "0" * 64}, "principal_channel": False}, "paper", "weight", False),
        (
            {"fingerprints": {Q0: "0" * 64}, "basis": "activation", "principal_channel": True},
            *("function-aware", "activation", True),
        ),
    ],
)
def test_a_given_field_wins_over_the_preset_and_old_files_keep_their_meaning(given, preset, basis, gains):
    config = HipLoraConfig(**given)
    assert (config.preset, config.basis, config.principal_channel) == (preset, basis, gains)


def test_the_config_survives_saving(tiny, tmp_path):
    changes = {"rank_pattern": {"q_proj": 2}, "stability_gamma": 0.5, "task_type": TaskType.CAUSAL_LM}
    config = tiny.adapted(**changes).peft_config["default"]
    config.save_pretrained(tmp_path)
    loaded = peft.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, HipLoraConfig)
    assert loaded.to_dict() == config.to_dict()


def chosen_ranks(model):
    return {name: len(layer.hiplora_sigma["default"]) for name, layer in hip_layers(model)}


@pytest.mark.parametrize("basis", ["weight", "activation"])
@pytest.mark.parametrize("spec", [0.25, "energy:0.8"])
def test_an_adapter_with_ranks_of_the_layers_own_survives_saving_and_export(tiny, ids, tmp_path, basis, spec):
    model = tiny.trained(ids, basis=basis, principal_rank=spec)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(tiny.make(), tmp_path / "adapter").eval()
    assert chosen_ranks(again) == chosen_ranks(model) == again.peft_config["default"].principal_ranks
    assert torch.equal(logits(again, ids), logits(model, ids))
    hiplora.export.save_as_lora(model, tmp_path / "live")
    hiplora.export.save_as_lora(tmp_path / "adapter", tmp_path / "lora", check_logits=False)
    for folder in ("live", "lora"):
        plain = peft.PeftModel.from_pretrained(tiny.make(), tmp_path / folder).eval()
        torch.testing.assert_close(logits(plain, ids), logits(model, ids), rtol=1e-4, atol=1e-5)


def test_a_file_that_lost_its_ranks_is_said_to_be_damaged(tiny, tmp_path):
    tiny.adapted(principal_rank=0.25).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"principal_ranks": {}}))
    with pytest.raises(AdapterError, match=r"q_proj: .*no principal_ranks entry"):
        peft.PeftModel.from_pretrained(tiny.make(), tmp_path)
