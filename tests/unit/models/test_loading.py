import io
import sys

import pytest
import torch
from safetensors import safe_open

from hiplora.errors import ConfigError
from hiplora.models import fetch, load
from tests.tiny import tiny_tokenizer


def test_a_folder_loads_in_fp32_and_evaluation_mode_by_default(tiny_model_dir):
    model, tokenizer = load(str(tiny_model_dir))
    assert model.dtype == torch.float32
    assert not model.training
    assert tokenizer.pad_token == "<|pad|>"


def test_the_dtype_is_the_callers_choice(tiny_model_dir):
    model, _ = load(str(tiny_model_dir), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16


def test_a_tokenizer_without_padding_pads_with_its_end_token(tiny_model_dir, tmp_path):
    folder = tmp_path / "model"
    model, _ = load(str(tiny_model_dir))
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert load(str(folder))[1].pad_token == "<|eos|>"


def test_nothing_is_printed_where_nobody_watches(tiny_model_dir, monkeypatch):
    err = io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    load(str(tiny_model_dir))
    assert err.getvalue() == ""


def test_a_model_that_is_not_there_is_named_with_what_was_expected(tmp_path):
    with pytest.raises(
        ConfigError, match=r"model .*absent: cannot be loaded .* expected a folder with config\.json"
    ):
        load(str(tmp_path / "absent"))


@pytest.mark.real_model
def test_the_real_model_answers_a_question_through_its_chat_template(smollm2):
    model, tokenizer = load("smollm2-135m")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."


@pytest.mark.real_model
def test_the_real_model_is_plain_fp32_and_intact(smollm2):
    assert fetch("smollm2-135m", verify=True).resolve() == smollm2.resolve()
    assert "quantization" not in (smollm2 / "config.json").read_text()
    with safe_open(smollm2 / "model.safetensors", "pt") as file:
        names = list(file.keys())
        assert "lm_head.weight" not in names  # tied to the embedding
        assert {file.get_slice(name).get_dtype() for name in names} == {"F32"}
