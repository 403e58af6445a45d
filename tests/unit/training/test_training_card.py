"""The model card says what the adapter is and how to use it, and nothing about the machine it was made on."""

import pytest
import yaml

from hiplora.training.card import model_card
from hiplora.training.methods import METHODS as RECIPE_METHODS
from hiplora.training.recipe import TrainRecipe
from hiplora.training.result import TrainResult


def card(tmp_path, method="hiplora", **result):
    recipe = TrainRecipe.model_validate(
        {
            "model": str(tmp_path / "models" / "my-model"),
            "data": {"path": str(tmp_path / "rows.jsonl"), "held_out_fraction": 0.1},
            "method": method,
        }
    )
    made = TrainResult(
        adapter=tmp_path,
        metrics=[{"step": 1, "loss": 1.25}],
        **{
            "steps": 1,
            "tokens": 1234,
            "seconds": 2.0,
            "trainable_parameters": 5678,
            "peak_memory_bytes": 2**30,
            "held_out": {"before": 3.5, "after": 2.25},
            "data": {
                "shape": "alpaca",
                "sources": {"train": {"file": "rows.jsonl", "sha256": "0123abcd", "rows": 9}},
                "encoding": {"sequences": 9, "tokens": 1200, "learned_tokens": 300},
            },
            "warnings": ["2 of 9 responses are cut at 64 tokens"],
            **result,
        },
    )
    return model_card(recipe, made)


def test_the_card_has_front_matter_results_data_recipe_and_warnings(tmp_path):
    text = card(tmp_path)
    head = yaml.safe_load(text.split("---")[1])
    assert (head["base_model"], head["library_name"]) == ("my-model", "peft")
    for part in ("HiP-LoRA adapter for my-model", "1.2500", "3.5000", "2.2500", "5,678", "1,024 MiB"):
        assert part in text
    for part in (
        "rows.jsonl",
        "0123abcd",
        "2 of 9 responses are cut",
        "principal_rank: 32",
        "stability_weight",
    ):
        assert part in text


def test_the_recipe_in_the_card_is_a_recipe(tmp_path):
    text = card(tmp_path)
    block = text.split("```yaml\n")[1].split("```")[0]
    assert TrainRecipe.model_validate(yaml.safe_load(block)).data.path == "rows.jsonl"


@pytest.mark.parametrize("method", RECIPE_METHODS)
def test_no_path_of_the_machine_is_in_the_card(tmp_path, method):
    assert str(tmp_path) not in card(tmp_path, method)


@pytest.mark.parametrize("method", ["hiplora", "corda", "lora_null"])
def test_of_a_calibration_text_the_card_has_the_name(tmp_path, method):
    for source, said in ((str(tmp_path / "prose.txt"), "prose.txt"), ("owner/prose", "owner/prose")):
        text = card(tmp_path, {"name": method, "calibration_text": source})
        assert f"calibration_text: {said}\n" in text
        assert str(tmp_path) not in text


def test_an_adapter_of_our_own_format_says_how_to_load_and_to_export_it(tmp_path):
    for method in ("hiplora", "proj_lora"):
        text = card(tmp_path, method)
        assert "import hiplora" in text
        assert "hiplora export" in text
    for method in ("lora", "pissa", "milora", "corda", "lora_null", "split_lora"):
        text = card(tmp_path, method)
        assert "import hiplora " not in text
        assert "stock PEFT loads it" in text


def test_without_held_out_rows_no_held_out_loss_is_claimed(tmp_path):
    assert "held-out loss" not in card(tmp_path, held_out=None)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "stays in the complement"),
        ({"projection": "soft"}, "the less, the more energy"),
        ({"preset": "paper"}, "one gain for each"),
        ({"preset": "paper", "residual_projection": False}, "free to change"),
    ],
)
def test_the_card_promises_the_complement_only_where_it_is_kept(tmp_path, settings, said):
    text = card(tmp_path, {"name": "hiplora", **settings})
    assert said in text
    assert ("complement" in text.split("```yaml")[0]) == (
        said not in ("the less, the more energy", "free to change")
    )
