"""Training on a base in 4 bits (`train.load_in_4bit`): with bitsandbytes where it is installed."""

import importlib.util
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hiplora.errors import ConfigError
from hiplora.extras import MissingExtraError
from hiplora.models import load
from hiplora.training import train
from tests.commands import run
from tests.integration.training import small_recipe, small_rows
from tests.tiny import tiny_llama

METHODS = {"hiplora": {"name": "hiplora", "r": 4, "principal_rank": 8, "calibration_tokens": 500}, "lora": "lora"}
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (extra: quant)"
)


@pytest.fixture
def recipe(tiny_model_dir, tmp_path):
    rows = str(small_rows(tmp_path / "rows.jsonl"))
    return lambda method="lora", **more: small_recipe(tiny_model_dir, rows, method, load_in_4bit=True, **more)


@needs_bitsandbytes
@pytest.mark.parametrize("method", METHODS)
def test_the_base_stays_as_it_was_measured_and_the_adapter_is_at_home_on_the_whole_one(
    method, recipe, tmp_path, capsys
):
    """Evaluation packs 4-bit weights on some CPUs, and no gradient passes them: it comes before the adapter here."""
    result = train(recipe(METHODS[method], drift_tokens=64, steps=4), tmp_path / "out")
    assert result.held_out["after"] < result.held_out["before"]
    assert set(result.drift) == {"prose", "python code"}
    base = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert run(capsys, "drift", base, "--adapter", tmp_path / "out", "--tokens", 64)[0] == 0
    assert run(capsys, "export", tmp_path / "out", "--to", "dense", "--out", tmp_path / "dense")[0] == 0


def test_the_library_is_asked_for_before_the_model_is_loaded(recipe, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else real(name))
    with pytest.raises(MissingExtraError, match=r"bitsandbytes is not installed; run: pip install 'hiplora\[quant\]'"):
        train(recipe(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["pissa", "milora", "corda", "lora_null", "osf"])
def test_methods_that_change_the_base_weights_are_refused(method, recipe):
    with pytest.raises(ValueError, match=f"`train.load_in_4bit` holds weights that {method}"):
        recipe(method, weight_decay=0)


def test_what_transformers_is_asked_for_is_qloras_format(tiny_model_dir, monkeypatch):
    asked = {}

    def stub(path, **options):
        asked.update(options)
        return tiny_llama(), {"missing_keys": []}

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", stub)
    monkeypatch.setattr("transformers.BitsAndBytesConfig", dict)
    load(str(tiny_model_dir), torch.bfloat16, in_4bit=torch.device("cpu"))
    assert asked["device_map"] == {"": torch.device("cpu")}
    assert asked["quantization_config"] == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }


def test_names_of_other_tools_are_answered_with_ours(tiny_model_dir, tmp_path, capsys):
    rows = small_rows(tmp_path / "rows.jsonl")
    options = [word for name in ("load_in_4bit", "train.load_in_8bit") for word in ("--set", f"{name}=true")]
    code, _, err = run(capsys, "train", "--model", tiny_model_dir, "--data", rows, *options, "--dry-run")
    assert code == ConfigError.exit_code
    assert err.count("did you mean `train.load_in_4bit`?") == 2
