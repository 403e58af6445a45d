import pytest
from peft import get_peft_model

from hiplora.errors import ConfigError
from hiplora.recipes.methods import METHODS as RECIPE_METHODS
from hiplora.study.compare import CompareSettings
from hiplora.study.methods import HIPLORA, LORA, METHODS, Ranks, mismatch
from hiplora.training.adapters import adapter_config
from tests.tiny import tiny_llama


def trainable(method, ranks):
    settings = ranks.settings(method)
    config = adapter_config(RECIPE_METHODS[settings["name"]].model_validate(settings))
    return sum(p.numel() for p in get_peft_model(tiny_llama(), config).parameters() if p.requires_grad)


@pytest.mark.parametrize(("r", "k"), [(1, 1), (4, 8), (4, 32), (16, 32)])
def test_no_other_lora_rank_matches_the_parameters_better(r, k):
    ranks = Ranks(r, k)
    ours, theirs = trainable(HIPLORA, ranks), trainable(LORA, ranks)
    step = trainable(LORA, Ranks(r + 1, k)) - theirs
    assert 0 < ours - theirs <= step / 2


def test_all_methods_get_the_same_but_for_what_is_hip_loras_own():
    lora, *others = (Ranks(4, 8, 8, 0.1).settings(method) for method in METHODS)
    for hip, preset in zip(others, ("paper", "function-aware"), strict=True):
        assert hip == {**lora, "name": "hiplora", "principal_rank": 8, "preset": preset}
    recipes = [CompareSettings("m", "d").recipe(method, "rows.jsonl", "text") for method in METHODS]
    assert recipes[0].train == recipes[1].train == recipes[2].train
    assert recipes[0].data == recipes[1].data == recipes[2].data
    assert recipes[0].seed == recipes[1].seed == recipes[2].seed


def test_the_mismatch_is_said_in_per_cent():
    assert "1,010 with HiP-LoRA, whose gains are trained too, 1,000 with LoRA (+1.00 %)" in mismatch(
        {LORA: 1000, HIPLORA: 1010}
    )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 0}, "--steps is 0"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"max_length": 1}, "--max-length is 1"),
        ({"seed": -1}, "--seed is -1"),
        ({"lr": 0.0}, r"--lr is 0\.0"),
        ({"lr": float("nan")}, "--lr is nan"),
        ({"rank": 0}, "--rank is 0"),
        ({"principal_rank": 0}, "--principal-rank is 0"),
        ({"heldout_fraction": 1.0}, r"--heldout-fraction is 1\.0"),
    ],
)
def test_an_option_out_of_range_is_named(wrong, said):
    with pytest.raises(ConfigError, match=said):
        CompareSettings("model", "data", **wrong)


def test_settings_of_the_command_reach_the_recipe():
    settings = CompareSettings(
        "m", "d", steps=7, lr=0.5, batch_size=3, max_length=9, rank=5, principal_rank=6, seed=8
    )
    recipe = settings.recipe(HIPLORA, "rows.jsonl", "alpaca")
    assert (recipe.model, recipe.data.path, recipe.data.format, recipe.seed) == (
        "m",
        "rows.jsonl",
        "alpaca",
        8,
    )
    train = recipe.train
    assert (train.steps, train.lr, train.batch_size, train.gradient_accumulation) == (7, 0.5, 3, 1)
    assert (train.max_length, train.packing) == (9, False)
    assert (recipe.method.r, recipe.method.principal_rank, recipe.method.lora_alpha) == (5, 6, 10)
