import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from hiplora.adapters import AdapterUpdate, save_as_lora, save_dense
from hiplora.adapters.dense import merge_into
from hiplora.errors import AdapterError, ConfigError
from tests.models.zoo import CASE
from tests.tiny import save_tiny
from tests.unit.adapters.samples import (
    base_model,
    edit_config,
    edit_tensors,
    hip_config,
    logits,
    save_tiny_gpt2,
    saved,
)


def assert_same_model(folder, model, base_dir):
    actual, expected, base = logits(base_model(folder)), logits(model), logits(base_model(base_dir))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert (expected - base).abs().max() > 1e-3


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("name", ["one", "lora"])
def test_the_folder_is_a_whole_model_with_equal_logits(adapters, tmp_path, name, live):
    folder = adapters[name]
    report = save_dense(adapters.models[name] if live else folder, tmp_path / "out")
    assert_same_model(tmp_path / "out", adapters.models[name], adapters.base)
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
        ({"target_modules": ["c_attn", "c_proj", "c_fc"]}, False),
    ],
)
def test_tied_embeddings_are_untied_only_where_the_adapter_changes_one_side(tmp_path, changes, untied):
    gpt2 = "c_attn" in changes.get("target_modules", ())  # tied too, and its layers are transposed
    base = save_tiny_gpt2(tmp_path / "tied") if gpt2 else save_tiny(tmp_path / "tied", tie=True)
    folder, model = saved(base, tmp_path / "a", hip_config(**changes))
    assert save_dense(folder, tmp_path / "out")["untied"] == untied
    merged = base_model(tmp_path / "out")
    assert merged.config.tie_word_embeddings is not untied
    assert torch.equal(merged.lm_head.weight, merged.get_input_embeddings().weight) is not untied
    assert_same_model(tmp_path / "out", model, base)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("name", ["BART", "T5"])
def test_untying_the_head_leaves_the_embeddings_of_an_encoder_and_decoder_tied(tmp_path, name, changes):
    base, config = tmp_path / "base", {"target_modules": ["q_proj", "q"], "init_lora_weights": False, **changes}
    CASE[name].make().save_pretrained(base)
    model = peft.get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(base), peft.LoraConfig(**config)).eval()
    for copy in (value for own, value in model.named_parameters() if "modules_to_save" in own):
        copy.mul_(2.0)
    model.save_pretrained(tmp_path / "a")
    assert save_dense(tmp_path / "a", tmp_path / "out")["untied"]
    merged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(12).view(2, 6) + 3
    found, expected = (one(input_ids=ids, decoder_input_ids=ids).logits for one in (merged, model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


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


def test_the_rounding_of_a_large_half_precision_weight_is_reported():
    """The square of its norm, 600², is beyond float16."""
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(600, 600, bias=False)).half()
    model[0].weight.data = torch.randn(600, 600, generator=generator).half()
    pair = torch.randn(2, 600, generator=generator), torch.randn(600, 2, generator=generator)
    difference = merge_into(model, AdapterUpdate("", "lora", {}, {"0": pair}), None)["0"]
    assert 1e-5 < difference < 1e-3


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", None])
def test_a_classifier_over_a_base_of_another_class_keeps_its_labels(tiny_model_dir, tmp_path, task):
    kind = AutoModelForTokenClassification if task == "TOKEN_CLS" else AutoModelForSequenceClassification
    network = kind.from_pretrained(tiny_model_dir, num_labels=5, pad_token_id=0)
    config = hip_config(task_type=task, modules_to_save=["score"], init_weights=False)
    model = peft.get_peft_model(network, config).eval()
    model.save_pretrained(tmp_path / "a")
    save_dense(tmp_path / "a", tmp_path / "out")
    dense = kind.from_pretrained(tmp_path / "out", pad_token_id=0).eval()
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-4, atol=1e-5)
    assert logits(dense).shape[-1] == 5


def test_what_cannot_be_merged_is_refused_and_nothing_is_written(adapters, tmp_path):
    shape = {"vocab_size": 259, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**shape, hidden_size=64, num_key_value_heads=4)).save_pretrained(tmp_path / "wide")
    quantised = shutil.copytree(adapters.base, tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantised / "config.json").write_text(json.dumps(config))
    cut, nameless = (shutil.copytree(adapters["hip whole"], tmp_path / name) for name in ("cut", "nameless"))
    head = "base_model.model.lm_head.weight"
    edit_tensors(cut, lambda tensors: tensors.update({head: tensors[head][:-3]}))
    edit_config(nameless, base_model_name_or_path=None)
    for folder, options, why in (
        (adapters["one"], {"base": save_tiny_gpt2(tmp_path / "g")}, r"has no linear layer model\.layers\.0"),
        (adapters["lora"], {"base": tmp_path / "wide"}, "the adapter is for 32 × 64, the weight in .* is 64 × 64"),
        (adapters["one"], {"base": quantised}, "unquantised"),
        (cut, {}, r"lm_head\.weight is \(256, 64\), the base model's \(259, 64\)"),
        (cut, {"dtype": "int8"}, "dtype is 'int8'"),
        (nameless, {}, "--base"),
    ):
        options = {name: str(value) for name, value in options.items()}
        with pytest.raises(ConfigError if "dtype" in options else AdapterError, match=why):
            save_dense(folder, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()


def test_a_model_with_other_logits_is_refused_unless_they_are_not_compared(adapters, tmp_path, monkeypatch):
    save = LlamaForCausalLM.save_pretrained

    def spoilt(model, folder):
        model.model.norm.weight.data.mul_(2)
        save(model, folder)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", spoilt)
    with pytest.raises(AdapterError, match="logits differ by"):
        save_dense(adapters["one"], tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert save_dense(adapters["one"], tmp_path / "out", check_logits=False)["logit_difference"] is None


@pytest.mark.parametrize("how", [{}, {"save_embedding_layers": False}])
def test_an_adapter_with_tokens_of_its_own_is_exported_with_its_tokenizer(tiny_model_dir, tmp_path, how):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    whole = {"modules_to_save": ["embed_tokens", "lm_head"], "init_lora_weights": False}
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], **whole)).eval()
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
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")(ids).logits, expected)
    for folder in ("dense", "plain"):
        assert len(AutoTokenizer.from_pretrained(tmp_path / folder)) == len(tokenizer)
    assert "im_end" not in (tiny_model_dir / "tokenizer.json").read_text()
