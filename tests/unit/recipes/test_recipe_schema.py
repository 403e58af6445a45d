"""The recipe's fields: documented, the paper's defaults, the tuner's names, nothing accepted and ignored."""

import dataclasses

import pytest
from peft import PeftConfig
from pydantic import ValidationError

from hiplora.data.examples import DataSettings
from hiplora.recipes.methods import OF_THE_SPLIT
from hiplora.training.adapters import adapter_config
from hiplora.training.methods import METHODS
from hiplora.training.recipe import TrainRecipe, TrainSettings
from hiplora.tuner import HipLoraConfig

BLOCKS = [TrainRecipe, DataSettings, TrainSettings, *METHODS.values()]
SMALLEST = {"model": "some/model", "data": "rows.jsonl"}


def recipe(**blocks):
    return TrainRecipe.model_validate({**SMALLEST, **blocks})


def problems(**blocks):
    with pytest.raises(ValidationError) as caught:
        recipe(**blocks)
    return [(error["loc"], error["type"]) for error in caught.value.errors()]


@pytest.mark.parametrize("block", BLOCKS)
def test_every_field_says_what_it_is_for(block):
    undocumented = [name for name, field in block.model_fields.items() if not field.description]
    assert undocumented == []


def test_the_paper_is_one_switch_away():
    made = recipe(method={"name": "hiplora", "preset": "paper"})
    train, method = made.train, made.method
    assert (train.steps, train.epochs, train.max_length, train.packing) == (2000, None, 2048, True)
    assert train.batch_size * train.gradient_accumulation == 128
    assert (train.lr, train.warmup_ratio, train.weight_decay, train.max_grad_norm) == (2e-4, 0.03, 0.01, 1.0)
    assert (method.name, method.principal_rank, method.r, method.lora_alpha) == ("hiplora", 32, 16, 32)
    assert method.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert (method.basis, method.basis_sides, method.projection) == ("weight", "both", "hard")
    assert (method.lora_dropout, made.seed) == (0.05, 42)


def test_the_lost_learning_rate_is_said_to_be_a_reading():
    assert "our reading" in TrainSettings.model_fields["lr"].description


def test_a_recipe_has_the_tuners_fields_under_the_tuners_names_and_defaults():
    common = {field.name for field in dataclasses.fields(PeftConfig)}
    own = {field.name: getattr(HipLoraConfig(), field.name) for field in dataclasses.fields(HipLoraConfig)}
    written_by_the_tuner = {"fingerprints", "principal_ranks", "base_precision", "calibration"}
    left = own.keys() - common - written_by_the_tuner
    expected = {name: own[name] for name in left}
    expected["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
    fields = METHODS["hiplora"](preset="paper").model_dump(exclude={"name", "preset"})
    of_the_calibration = {"calibration_text": None, "calibration_tokens": 10_000}
    assert fields == {**expected, **of_the_calibration}


def config_of(method):
    return (
        adapter_config(method, method.schedule(100)) if method.name == "adalora" else adapter_config(method)
    )


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_of_a_method_reaches_the_adapter(name):
    own = {"name", "preset", "calibration_text", "calibration_tokens", *OF_THE_SPLIT}
    settings = METHODS[name]().model_dump(exclude=own)
    changed = {
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
    if name == "adalora":
        settings = {key: value for key, value in settings.items() if not key.endswith("_pattern")}
        settings |= {"layers_pattern": None}
    assert settings.keys() <= changed.keys()
    wanted = {key: changed[key] for key in settings}
    config = config_of(recipe(method={"name": name, **wanted}).method)
    if name == "adalora":
        wanted["target_r"] = wanted.pop("r")
    for key, value in wanted.items():
        given = getattr(config, key)
        assert (sorted(given) if isinstance(given, set) else given) == value, key


def test_the_methods_become_what_they_are_called():
    made = {name: config_of(recipe(method=name).method) for name in METHODS}
    assert (made["adalora"].peft_type, made["adalora"].init_r, made["adalora"].target_r) == (
        "ADALORA",
        24,
        16,
    )
    assert made["hiplora"].principal_channel is False
    paper = adapter_config(recipe(method={"name": "hiplora", "preset": "paper"}).method)
    assert paper.principal_channel is True
    assert made["proj_lora"].principal_channel is False
    assert (made["lora"].peft_type, made["lora"].init_lora_weights) == ("LORA", True)
    assert made["pissa"].init_lora_weights == "pissa"
    assert (made["corda"].init_lora_weights, made["corda"].corda_config.corda_method) == ("corda", "kpm")
    assert {name for name, method in METHODS.items() if method.moves_base} == {
        *("pissa", "milora", "corda", "lora_null")
    }


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("lora", "principal_rank"),
        ("pissa", "stability_weight"),
        ("proj_lora", "stability_mode"),
        ("milora", "calibration_text"),
    ],
)
def test_a_field_of_another_method_is_refused(name, field):
    assert problems(method={"name": name, field: 1}) == [(("method", name, field), "extra_forbidden")]


def test_values_are_not_guessed_into_another_type():
    found = problems(train={"steps": "10", "batch_size": True, "lr": "fast", "packing": 1}, seed=1.5)
    assert {loc[-1] for loc, _ in found} == {"steps", "batch_size", "lr", "packing", "seed"}


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_learning_rate_is_a_positive_finite_number(number):
    assert problems(train={"lr": number})


def test_short_forms_stand_for_blocks():
    made = recipe(method="lora")
    assert made.method.name == "lora"
    assert made.data.path == "rows.jsonl"
    assert recipe(method={"r": 8}).method.name == "hiplora"


def test_epochs_take_the_place_of_steps():
    assert recipe(train={"epochs": 2.0}).train.steps is None
    assert problems(train={"epochs": 2.0, "steps": 10})
    assert problems(train={"steps": None})


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"path": "a.jsonl", "hub": "b"},
        {"path": "a.jsonl", "split": "train"},
        {"path": "a.jsonl", "held_out": "b.jsonl", "held_out_fraction": 0.1},
        {"path": "a.jsonl", "held_out_limit": 3},
        {"path": "a.jsonl", "format": "text", "template": "chat"},
    ],
)
def test_contradictions_in_the_data_block_are_refused(data):
    assert problems(data=data) == [(("data",), "value_error")]


def test_measuring_on_the_way_needs_something_to_measure_on():
    assert problems(train={"eval_every": 5})
    assert recipe(train={"eval_every": 5}, data={"path": "a.jsonl", "held_out": "b.jsonl"})


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValidationError):
        recipe().seed = 3


@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_written_out_reads_back_the_same(name):
    made = recipe(method=name, train={"epochs": 1.5}, data={"path": "a.jsonl", "held_out_fraction": 0.5})
    assert TrainRecipe.model_validate(made.model_dump(mode="json")) == made


def test_without_a_word_the_settings_are_those_that_disturb_least():
    for name in ("hiplora", "proj_lora"):
        method = recipe(method=name).method
        assert (method.preset, method.basis) == ("function-aware", "activation")
        assert method.target_modules == ["gate_proj", "up_proj", "down_proj"]


def test_what_is_said_goes_before_the_preset():
    method = recipe(method={"name": "hiplora", "preset": "paper", "basis": "activation"}).method
    assert (method.basis, method.target_modules[0]) == ("activation", "q_proj")


@pytest.mark.parametrize("rank", [8, 0.25, "energy:0.95", "energy:.9"])
def test_a_principal_rank_in_each_of_its_kinds_reaches_the_adapter(rank):
    assert (
        adapter_config(recipe(method={"name": "hiplora", "principal_rank": rank}).method).principal_rank
        == rank
    )


@pytest.mark.parametrize("rank", [0, 1.0, "energy:1", "energy:0", "energy:0.0", "32", "all"])
def test_what_is_no_principal_rank_is_refused(rank):
    found = problems(method={"name": "hiplora", "principal_rank": rank})
    assert {loc[:3] for loc, _ in found} == {("method", "hiplora", "principal_rank")}


def test_the_soft_projection_is_for_the_activation_basis():
    assert (
        adapter_config(recipe(method={"name": "proj_lora", "projection": "soft"}).method).projection == "soft"
    )
    assert problems(method={"name": "proj_lora", "projection": "soft", "basis": "weight"})


@pytest.mark.parametrize(
    "setting",
    [{"stability_weight": 0.5}, {"gain_lr_ratio": 2.0}, {"relative_gains": True}, {"stability_mode": "none"}],
)
def test_what_concerns_the_gains_is_refused_where_there_are_none(setting):
    assert problems(method={"name": "hiplora", **setting})
    assert recipe(method={"name": "hiplora", "principal_channel": True, **setting}).method.principal_channel
    assert recipe(method={"name": "hiplora", "preset": "paper", **setting}).method.principal_channel


def test_neither_gains_nor_projection_is_refused():
    assert problems(method={"name": "hiplora", "residual_projection": False})


def test_every_client_has_as_many_passes_in_a_step():
    found = problems(method={"name": "split_lora", "clients": 3}, train={"gradient_accumulation": 4})
    assert found == [((), "value_error")]
    made = recipe(method={"name": "split_lora", "clients": 2}, train={"gradient_accumulation": 4})
    assert (made.method.clients, made.method.cut_layer, made.method.average_every) == (2, 3, 25)
    assert recipe(method="split_lora").method.clients == 4
