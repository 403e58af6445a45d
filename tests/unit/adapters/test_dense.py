import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hiplora.adapters import dense, save_as_lora, save_dense
from hiplora.errors import AdapterError, ConfigError
from tests.tiny import save_tiny
from tests.unit.adapters.samples import (
    ATTENTION,
    base_model,
    edit_config,
    edit_tensors,
    hip_config,
    leaky,
    logits,
    save_tiny_gpt2,
    saved,
)


def assert_same_model(folder, model, base_dir):
    found, expected, base = logits(base_model(folder)), logits(model), logits(base_model(base_dir))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (expected - base).abs().max() > 1e-3


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("kind", ["hiplora", "lora"])
def test_the_folder_is_a_whole_model_with_equal_logits(tiny_model_dir, tmp_path, kind, live):
    config = hip_config() if kind == "hiplora" else LoraConfig(r=4, target_modules=ATTENTION)
    folder, model = saved(tiny_model_dir, tmp_path / "a", config)
    report = save_dense(model if live else folder, tmp_path / "out")
    assert_same_model(tmp_path / "out", model, tiny_model_dir)
    assert report["logit_difference"] < 1e-5
    assert report["largest_difference"]["relative"] < 1e-7
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("A test.").input_ids, skip_special_tokens=True) == "A test."
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert len(json.loads((tmp_path / "out" / "export.json").read_text())["modules"]) == 8
    assert f'base_model: "{Path(report["base"]).name}"\n' in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "untied"),
    [
        ({}, False),
        ({"target_modules": ["q_proj", "lm_head"]}, True),
        ({"modules_to_save": ["lm_head"]}, True),
        ({"modules_to_save": ["embed_tokens"]}, True),
    ],
)
def test_tied_embeddings_are_untied_only_where_the_adapter_changes_one_side(tmp_path, changes, untied):
    base = save_tiny(tmp_path / "tied", tie=True)
    folder, model = saved(base, tmp_path / "a", hip_config(**changes))
    assert save_dense(folder, tmp_path / "out")["untied"] == untied
    merged = base_model(tmp_path / "out")
    assert merged.config.tie_word_embeddings is not untied
    assert torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight) is not untied
    assert_same_model(tmp_path / "out", model, base)


def test_transposed_layers_are_merged_in_their_own_layout(tmp_path):
    base = save_tiny_gpt2(tmp_path / "gpt2")
    folder, model = saved(base, tmp_path / "a", hip_config(target_modules=["c_attn", "c_proj", "c_fc"]))
    save_dense(folder, tmp_path / "out")
    assert_same_model(tmp_path / "out", model, base)


def test_each_sum_is_rounded_once_to_the_base_models_format_or_the_one_asked_for(tmp_path):
    base = save_tiny(tmp_path / "bf16", dtype=torch.bfloat16)
    folder, _ = saved(base, tmp_path / "a", hip_config())
    assert save_dense(folder, tmp_path / "same")["dtype"] == "bfloat16"
    wide = save_dense(folder, tmp_path / "wide", dtype="float32")
    assert wide["largest_difference"]["relative"] < 1e-7
    same, exact = (base_model(tmp_path / name, dtype="auto").state_dict() for name in ("same", "wide"))
    assert {tensor.dtype for tensor in same.values()} == {torch.bfloat16}
    for name, tensor in exact.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor.bfloat16(), same[name])
    assert 1e-4 < save_dense(folder, tmp_path / "half", dtype="bfloat16")["largest_difference"]["relative"] < 1e-2


def test_another_base_model_is_refused_and_nothing_is_written(hip, tiny_model_dir, tmp_path):
    lora, _ = saved(tiny_model_dir, tmp_path / "a", LoraConfig(r=4, target_modules=["k_proj"]))
    settings = LlamaConfig.from_pretrained(tiny_model_dir)
    settings.num_key_value_heads = 4
    LlamaForCausalLM(settings).save_pretrained(tmp_path / "wide")
    quantised = shutil.copytree(tiny_model_dir, tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantised / "config.json").write_text(json.dumps(config))
    for folder, base, why in (
        (hip[0], save_tiny(tmp_path / "other", seed=1), r"k_proj: the weight in .* is not the one"),
        (hip[0], save_tiny_gpt2(tmp_path / "gpt2"), r"has no linear layer model\.layers\.0"),
        (lora, tmp_path / "wide", "the adapter is for 32 × 64, the weight in .* is 64 × 64"),
        (hip[0], quantised, "unquantised"),
    ):
        with pytest.raises(AdapterError, match=why):
            save_dense(folder, tmp_path / "out", base=str(base))
        assert not (tmp_path / "out").exists()


def test_a_model_with_other_logits_is_refused_unless_they_are_not_compared(hip, tmp_path, monkeypatch):
    save = dense._save

    def spoilt(model, *arguments):
        model.model.norm.weight.data.mul_(2)
        save(model, *arguments)

    monkeypatch.setattr(dense, "_save", spoilt)
    with pytest.raises(AdapterError, match="logits differ by"):
        save_dense(hip[0], tmp_path / "out")
    assert not list(tmp_path.iterdir())
    report = save_dense(hip[0], tmp_path / "out", check_logits=False)
    assert report["logit_difference"] is None


def test_what_cannot_be_merged_is_refused(tiny_model_dir, tmp_path):
    leaking, module = leaky(tiny_model_dir, tmp_path / "leaky")
    nameless, _ = saved(tiny_model_dir, tmp_path / "a", hip_config(modules_to_save=["lm_head"]))
    name = "base_model.model.lm_head.weight"
    edit_tensors(nameless, lambda tensors: tensors.update({name: tensors[name][:-3]}))
    for folder, error, why, options in (
        (leaking, AdapterError, f"{module} leaks", {}),
        (nameless, AdapterError, r"lm_head\.weight is \(256, 64\), the base model's \(259, 64\)", {}),
        (nameless, ConfigError, "dtype is 'int8'", {"dtype": "int8"}),
    ):
        with pytest.raises(error, match=why):
            save_dense(folder, tmp_path / "out", **options)
    edit_config(nameless, base_model_name_or_path=None)
    with pytest.raises(AdapterError, match="--base"):
        save_dense(nameless, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", [{}, {"save_embedding_layers": False}])
def test_an_adapter_with_tokens_of_its_own_is_exported_with_its_tokenizer(tiny_model_dir, tmp_path, how):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], init_lora_weights=False
    )
    model = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter", **how)
    tokenizer.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[5, 6, len(tokenizer) - 1, 7]])
    expected = model(ids).logits
    save_dense(tmp_path / "adapter", tmp_path / "dense", base=str(tiny_model_dir))
    save_as_lora(tmp_path / "adapter", tmp_path / "plain", base=str(tiny_model_dir))
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(dense(ids).logits, expected)
    for folder in ("dense", "plain"):
        assert len(AutoTokenizer.from_pretrained(tmp_path / folder)) == len(tokenizer)
    assert "im_end" not in (tiny_model_dir / "tokenizer.json").read_text()
