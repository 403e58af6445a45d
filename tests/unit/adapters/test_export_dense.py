import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from transformers import AutoTokenizer

from hiplora.adapters import AdapterUpdate, save_dense
from hiplora.adapters.streaming import MergedTensors
from hiplora.errors import AdapterError, ConfigError
from tests.tiny import save_tiny
from tests.unit.adapters.samples import (
    ATTENTION,
    base_model,
    hip_config,
    leaky,
    logits,
    save_tiny_gpt2,
    saved,
)


def assert_same_model(folder, model, base_dir, **options):
    found, expected, base = logits(base_model(folder, **options)), logits(model), logits(base_model(base_dir))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (expected - base).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["hiplora", "lora"])
def test_the_merged_folder_loads_without_peft_and_gives_equal_logits(tiny_model_dir, tmp_path, kind):
    config = hip_config() if kind == "hiplora" else LoraConfig(r=4, target_modules=ATTENTION)
    folder, model = saved(tiny_model_dir, tmp_path / "a", config)
    report = save_dense(folder, tmp_path / "out")
    assert_same_model(tmp_path / "out", model, tiny_model_dir)
    assert report.logits < 1e-5
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_it_is_a_whole_model_with_tokenizer_and_generation_settings(hip, tmp_path):
    save_dense(hip[0], tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("A test.").input_ids, skip_special_tokens=True) == "A test."
    assert (tmp_path / "out" / "generation_config.json").exists()
    assert json.loads((tmp_path / "out" / "export.json").read_text())["modules"] == 8


def test_tied_embeddings_stay_tied_where_the_adapter_leaves_them_alone(tmp_path):
    base = save_tiny(tmp_path / "tied", tie=True)
    folder, model = saved(base, tmp_path / "a", hip_config())
    report = save_dense(folder, tmp_path / "out")
    merged = base_model(tmp_path / "out")
    assert not report.untied
    assert merged.config.tie_word_embeddings
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert_same_model(tmp_path / "out", model, base)


@pytest.mark.parametrize("change", ["adapt the head", "save the head", "save the embeddings"])
def test_tied_embeddings_are_untied_where_the_adapter_changes_one_side(tmp_path, change):
    base = save_tiny(tmp_path / "tied", tie=True)
    config = {
        "adapt the head": hip_config(target_modules=["q_proj", "lm_head"]),
        "save the head": hip_config(modules_to_save=["lm_head"]),
        "save the embeddings": hip_config(modules_to_save=["embed_tokens"]),
    }[change]
    folder, model = saved(base, tmp_path / "a", config)
    report = save_dense(folder, tmp_path / "out")
    merged = base_model(tmp_path / "out")
    assert report.untied
    assert merged.config.tie_word_embeddings is False
    assert not torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)
    assert_same_model(tmp_path / "out", model, base)


def test_transposed_layers_are_merged_in_their_own_layout(tmp_path):
    base = save_tiny_gpt2(tmp_path / "gpt2")
    folder, model = saved(base, tmp_path / "a", hip_config(target_modules=["c_attn", "c_proj", "c_fc"]))
    save_dense(folder, tmp_path / "out")
    assert_same_model(tmp_path / "out", model, base)


def test_the_base_models_number_format_is_kept_unless_another_is_asked_for(tmp_path):
    base = save_tiny(tmp_path / "bf16", dtype=torch.bfloat16)
    folder, _ = saved(base, tmp_path / "a", hip_config())
    assert save_dense(folder, tmp_path / "same").dtype == "bfloat16"
    assert base_model(tmp_path / "same", dtype="auto").dtype == torch.bfloat16
    assert save_dense(folder, tmp_path / "other", dtype="float16").dtype == "float16"
    assert base_model(tmp_path / "other", dtype="auto").dtype == torch.float16


def test_half_precision_says_how_much_it_rounds(hip, tmp_path):
    report = save_dense(hip[0], tmp_path / "out", dtype="bfloat16")
    assert 1e-4 < report.logits < 0.1


def test_another_base_model_is_refused_and_nothing_is_written(hip, tmp_path):
    other = save_tiny(tmp_path / "other", seed=1)
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.k_proj: the weight in .* is not the one"):
        save_dense(hip[0], tmp_path / "out", base=str(other))
    assert not (tmp_path / "out").exists()


def test_a_base_model_with_other_layers_is_refused(hip, tmp_path):
    other = save_tiny_gpt2(tmp_path / "gpt2")
    with pytest.raises(AdapterError, match=r"has no linear layer model\.layers\.0"):
        save_dense(hip[0], tmp_path / "out", base=str(other))


def test_a_lora_adapter_of_another_shape_is_refused(tiny_model_dir, tmp_path):
    folder, _ = saved(tiny_model_dir, tmp_path / "a", LoraConfig(r=4, target_modules=["k_proj"]))
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = LlamaConfig.from_pretrained(tiny_model_dir)
    settings.num_key_value_heads = 4
    LlamaForCausalLM(settings).save_pretrained(tmp_path / "wide")
    with pytest.raises(AdapterError, match=r"the adapter is for 32 × 64, the weight in .* is 64 × 64"):
        save_dense(folder, tmp_path / "out", base=str(tmp_path / "wide"))


def test_an_adapter_trained_on_a_rounded_base_is_merged_into_the_full_one(tiny_model_dir, tmp_path):
    folder, _ = saved(tiny_model_dir, tmp_path / "a", hip_config(), dtype=torch.bfloat16)
    report = save_dense(folder, tmp_path / "out")
    assert report.dtype == "float32"


def test_a_live_model_is_exported_and_left_as_it_is(hip, tmp_path):
    folder, model = hip
    before = logits(model)
    save_dense(model, tmp_path / "live")
    save_dense(folder, tmp_path / "stored")
    assert torch.equal(logits(base_model(tmp_path / "live")), logits(base_model(tmp_path / "stored")))
    assert torch.equal(logits(model), before)


def test_the_report_says_what_was_checked_and_what_was_not(hip, tmp_path, monkeypatch):
    checked = save_dense(hip[0], tmp_path / "checked")
    assert (len(checked.checks), checked.note) == (3, "")
    assert checked.worst[1] < 1e-7
    unchecked = save_dense(hip[0], tmp_path / "unchecked", check_logits=False)
    assert (len(unchecked.checks), unchecked.logits) == (2, None)
    assert unchecked.note == "logits not compared: switched off"
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    large = save_dense(hip[0], tmp_path / "large")
    assert large.logits is None
    assert "GiB, more than is free" in large.note


def test_the_folder_has_a_model_card_that_names_the_base_and_the_checks(hip, tmp_path):
    report = save_dense(hip[0], tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"base_model: {report.base}\n" in card
    assert all(f"- {check}" in card for check in report.checks)
    assert json.loads((tmp_path / "out" / "export.json").read_text())["checks"] == report.checks


def test_a_leaky_adapter_is_refused(tiny_model_dir, tmp_path):
    folder, module = leaky(tiny_model_dir, tmp_path / "a")
    with pytest.raises(AdapterError, match=f"{module} leaks"):
        save_dense(folder, tmp_path / "out")


def test_a_merge_that_is_not_the_adapter_is_refused(hip, tmp_path, monkeypatch):
    delta = AdapterUpdate.delta
    monkeypatch.setattr(AdapterUpdate, "delta", lambda update, module: delta(update, module) / 2)
    with pytest.raises(AdapterError, match=r"layer model\.layers\.0\..*: the merged weight differs by \d"):
        save_dense(hip[0], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_model_with_other_logits_is_refused(hip, tmp_path, monkeypatch):
    blocks = MergedTensors.blocks

    def doubled(tensors, name):
        return (block * (2 if name == "model.norm.weight" else 1) for block in blocks(tensors, name))

    monkeypatch.setattr(MergedTensors, "blocks", doubled)
    with pytest.raises(AdapterError, match="logits differ by"):
        save_dense(hip[0], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_failure_while_writing_leaves_no_folder_behind(hip, tmp_path, monkeypatch):
    blocks = MergedTensors.blocks

    def full_disk(tensors, name):
        if name == "model.norm.weight":
            raise OSError(28, "No space left on device")
        return blocks(tensors, name)

    monkeypatch.setattr(MergedTensors, "blocks", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_dense(hip[0], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_quantised_base_model_is_refused(hip, tmp_path, tiny_model_dir):
    base = shutil.copytree(tiny_model_dir, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="unquantised"):
        save_dense(hip[0], tmp_path / "out", base=str(base))


def test_an_adapter_that_names_no_base_model_asks_for_one(hip, tmp_path):
    folder = shutil.copytree(hip[0], tmp_path / "a")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(AdapterError, match="--base"):
        save_dense(folder, tmp_path / "out")


def test_a_tensor_of_a_resized_vocabulary_is_refused(tiny_model_dir, tmp_path):
    folder, _ = saved(tiny_model_dir, tmp_path / "a", hip_config(modules_to_save=["lm_head"]))
    from tests.unit.adapters.samples import edit_tensors

    def shrink(tensors):
        tensors["base_model.model.lm_head.weight"] = tensors["base_model.model.lm_head.weight"][:-3]

    edit_tensors(folder, shrink)
    with pytest.raises(AdapterError, match=r"lm_head\.weight is \(256, 64\), the base model's \(259, 64\)"):
        save_dense(folder, tmp_path / "out")


def test_an_output_folder_that_exists_is_kept(hip, tmp_path):
    with pytest.raises(ConfigError, match="--overwrite"):
        save_dense(hip[0], tmp_path)
