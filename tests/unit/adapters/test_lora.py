import json
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from hiplora.adapters import lora, read_update, save_as_lora, save_dense
from hiplora.errors import AdapterError, ConfigError
from tests.tiny import save_tiny
from tests.unit.adapters.samples import (
    ATTENTION,
    base_model,
    deltas,
    edit_config,
    edit_tensors,
    hip_config,
    logits,
    logits_of_stock_process,
    product,
    saved,
    train,
    trained,
)


def assert_same_logits(found, expected, base):
    """Equal to rounding, and far from the base model's, so that equality says something."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (expected - base).abs().max() > 100 * (found - expected).abs().max() + 1e-3


def assert_exported(base, folder, model):
    stock = PeftModel.from_pretrained(base_model(base), folder).eval()
    assert set(deltas(stock)) == set(deltas(model))
    assert_same_logits(logits(stock), logits(model), logits(base_model(base)))


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.slow
def test_stock_peft_in_a_process_without_hiplora_gives_the_same_logits(hip, tiny_model_dir, tmp_path):
    folder, model = hip
    save_as_lora(folder, tmp_path / "out")
    found = logits_of_stock_process(tiny_model_dir, tmp_path / "out", tmp_path)
    assert_same_logits(found, logits(model), logits(base_model(tiny_model_dir)))


def test_the_folder_is_a_stock_adapter_of_rank_r_plus_k_and_scaling_one(hip, tmp_path):
    report = save_as_lora(hip[0], tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 10, 10)
    assert set(config["target_modules"]) == set(ATTENTION)
    assert config["base_model_name_or_path"] == config_of(hip[0])["base_model_name_or_path"]
    assert set(config) <= set(LoraConfig().to_dict()) | {"peft_version"}
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(tensors) == 16
    assert all(".lora_" in name and tensor.dtype == torch.float32 for name, tensor in tensors.items())
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["largest_difference"]["relative"] == report["largest_difference"]["relative"] < 1e-6
    assert record["logit_difference"] == report["logit_difference"] < 1e-5
    assert record["provenance"]["libraries"]["peft"] == peft.__version__
    card = (tmp_path / "out" / "README.md").read_text()
    assert record["base"] not in card
    assert f"--base {Path(record['base']).name}" in card
    assert "--max-lora-rank 16 " in card


@pytest.mark.parametrize(
    "config",
    [
        hip_config(principal_channel=False),
        hip_config(residual_projection=False),
        hip_config(layers_to_transform=[1]),
        hip_config(modules_to_save=["lm_head"]),
        hip_config(rank_pattern={"q_proj": 7, "layers.1.self_attn.v_proj": 1}, principal_rank_pattern={"o_proj": 2}),
        hip_config(target_modules=["q_proj", "lm_head"]),
        LoraConfig(r=4, lora_alpha=16, target_modules=ATTENTION, use_rslora=True),
    ],
)
@pytest.mark.parametrize("pad", [None, 16])
def test_whatever_is_exported_gives_equal_logits(tiny_model_dir, tmp_path, config, pad):
    folder, model = saved(tiny_model_dir, tmp_path / "a", config)
    report = save_as_lora(folder, tmp_path / "out", pad_rank=pad)
    assert pad is None or {row["rank"] for row in report["modules"]} == {pad}
    assert pad is None or config_of(tmp_path / "out")["rank_pattern"] == {}
    assert_exported(tiny_model_dir, tmp_path / "out", model)


def test_a_padding_that_is_too_small_is_refused_with_the_rank_it_takes(hip, tmp_path):
    with pytest.raises(AdapterError, match=r"rank 10, which does not fit .* pass at least 10"):
        save_as_lora(hip[0], tmp_path / "out", pad_rank=8)
    assert not list(tmp_path.iterdir())


def test_half_precision_says_what_it_costs_and_refuses_to_overflow(tiny_model_dir, tmp_path):
    folder, _ = saved(tiny_model_dir, tmp_path / "a", hip_config())
    half = save_as_lora(folder, tmp_path / "bf16", dtype="bfloat16")
    assert 1e-4 < half["largest_difference"]["relative"] < 2e-2
    assert load_file(tmp_path / "bf16" / "adapter_model.safetensors").popitem()[1].dtype == torch.bfloat16
    name = "base_model.model.model.layers.0.self_attn.q_proj.hiplora_delta.weight"
    edit_tensors(folder, lambda tensors: tensors[name].fill_(1e7))
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.q_proj: lora_B in float16"):
        save_as_lora(folder, tmp_path / "out", dtype="float16")
    with pytest.raises(ConfigError, match=r"dtype is 'int8'.*bfloat16"):
        save_as_lora(folder, tmp_path / "out", dtype="int8")


@pytest.mark.parametrize(
    ("scale", "config", "why"),
    [
        (1.001, {}, r"differs by 2\.0e-03 of its norm, more than the tolerance 1e-05"),
        (1.0, {"target_modules": ["q_proj"]}, "logits differ"),  # only a load by stock PEFT shows this one
    ],
)
def test_an_export_that_differs_is_refused(hip, tmp_path, monkeypatch, scale, config, why):
    def spoilt(update, folder, *options):
        write(update, folder, *options)
        edit_tensors(folder, lambda tensors: [tensor.mul_(scale) for tensor in tensors.values()])
        edit_config(folder, **config)

    write = lora.write_lora
    monkeypatch.setattr(lora, "write_lora", spoilt)
    with pytest.raises(AdapterError, match=why):
        save_as_lora(hip[0], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_one_adapter_of_a_live_model_is_exported_and_the_model_left_as_it_was(tiny_model_dir, tmp_path):
    model = trained(tiny_model_dir, hip_config(modules_to_save=["lm_head"]))
    expected = logits(model)
    model.add_adapter("second", hip_config(init_weights=False))
    model.set_adapter("second")
    model.train()
    before = {name: (p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    report = save_as_lora(model, tmp_path / "out", adapter="default")
    assert (report["logit_difference"], "live model" in report["note"]) == (None, True)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (grad, value) in before.items():
        assert after[name].requires_grad == grad, name
        assert torch.equal(after[name], value), name
    assert (model.training, model.active_adapters) == (True, ["second"])
    stock = PeftModel.from_pretrained(base_model(tiny_model_dir), tmp_path / "out").eval()
    torch.testing.assert_close(logits(stock), expected, rtol=1e-5, atol=1e-5)


def test_without_a_base_model_logits_are_not_compared_and_the_report_says_why(tiny_model_dir, tmp_path):
    folder, _ = saved(tiny_model_dir, tmp_path / "a", hip_config())
    edit_config(folder, base_model_name_or_path="nobody/nothing")
    report = save_as_lora(folder, tmp_path / "out")
    assert report["logit_difference"] is None
    assert "nobody/nothing" in report["note"]
    other = save_tiny(tmp_path / "other", seed=1)
    with pytest.raises(AdapterError, match="not the one that this adapter was made for"):
        save_as_lora(folder, tmp_path / "wrong", base=str(other))


def test_a_folder_that_exists_is_kept_and_the_adapter_never_replaced(tiny_model_dir, tmp_path):
    folder, _ = saved(tiny_model_dir, tmp_path / "runs" / "a", hip_config())
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="--overwrite"):
        save_as_lora(folder, tmp_path / "out")
    save_as_lora(folder, tmp_path / "out", overwrite=True, check_logits=False)
    for out in (folder, folder.parent):
        with pytest.raises(ConfigError, match="delete the adapter"):
            save_as_lora(folder, out, overwrite=True)
    assert read_update(folder).kind == "hiplora"


@pytest.mark.parametrize("kind", ["hiplora", "lora"])
def test_a_scaled_export_is_that_multiple_of_the_update(tiny_model_dir, hip, tmp_path, kind):
    folder = hip[0]
    if kind == "lora":
        folder, _ = saved(tiny_model_dir, tmp_path / "a", LoraConfig(r=4, target_modules=ATTENTION))
    save_as_lora(folder, tmp_path / "out", scale=0.25)
    before, after = read_update(folder), read_update(tmp_path / "out")
    for module in before.factors:
        torch.testing.assert_close(product(after, module), 0.25 * product(before, module))
    with pytest.raises(ConfigError, match="scale is 0; expected a number above 0"):
        save_as_lora(folder, tmp_path / "none", scale=0)


def test_whole_modules_have_no_scale(tiny_model_dir, tmp_path):
    folder, _ = saved(tiny_model_dir, tmp_path / "a", hip_config(modules_to_save=["lm_head"]))
    with pytest.raises(AdapterError, match=r"lm_head\.weight.*cannot be scaled"):
        save_as_lora(folder, tmp_path / "out", scale=0.5)


def test_a_prefix_renames_the_modules_for_servers_of_multimodal_checkpoints(hip, tmp_path):
    report = save_as_lora(hip[0], tmp_path / "out", prefix="model.language_model")
    assert report["logit_difference"] is None
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in names)
    assert all(name.startswith("model.language_model.") for name in config_of(tmp_path / "out")["target_modules"])


def test_a_module_that_the_base_lacks_or_that_peft_loads_elsewhere_is_refused(tiny_model_dir, tmp_path):
    folder, _ = saved(tiny_model_dir, tmp_path / "a", LoraConfig(r=4, target_modules=["q_proj"]))

    def rename(tensors):
        for name in [name for name in tensors if "layers.0" in name]:
            tensors[name.replace("self_attn", "self_attx")] = tensors.pop(name)

    edit_tensors(folder, rename)
    with pytest.raises(AdapterError, match=r"has no linear layer model\.layers\.0\.self_attx\.q_proj"):
        save_as_lora(folder, tmp_path / "out", check_logits=False)


def test_over_a_mixture_of_experts_peft_would_load_an_export_elsewhere_and_a_dense_one_is_exact(tmp_path):
    settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 259}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    settings |= {"shared_expert_intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, **experts}
    base = tmp_path / "moe"
    Qwen2MoeForCausalLM(Qwen2MoeConfig(**settings)).save_pretrained(base)
    folder, model = saved(base, tmp_path / "a", hip_config(r=2, principal_rank=2, target_modules=["down_proj"]))
    with pytest.raises(AdapterError, match=r"export with --to dense"):
        save_as_lora(folder, tmp_path / "out", check_logits=False)
    save_dense(folder, tmp_path / "dense")
    torch.testing.assert_close(logits(base_model(tmp_path / "dense")), logits(model), rtol=1e-4, atol=1e-5)


def test_modules_that_a_pattern_would_not_select_are_named_one_by_one(tiny_model_dir, tmp_path):
    folder, model = saved(tiny_model_dir, tmp_path / "a", hip_config(target_modules=["q_proj"]))
    edit_config(folder, target_modules="all-linear")
    save_as_lora(folder, tmp_path / "out")
    assert len(config_of(tmp_path / "out")["target_modules"]) == 2
    assert_exported(tiny_model_dir, tmp_path / "out", model)


def test_an_adapter_over_a_resized_vocabulary_is_exported(tiny_model_dir, tmp_path):
    base = base_model(tiny_model_dir)
    base.resize_token_embeddings(300, mean_resizing=False)
    torch.manual_seed(0)
    model = train(peft.get_peft_model(base, LoraConfig(r=4, target_modules=ATTENTION)))
    model.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    assert save_as_lora(tmp_path / "a", tmp_path / "out")["logit_difference"] < 1e-5
    save_dense(tmp_path / "a", tmp_path / "dense")
    dense = base_model(tmp_path / "dense")
    assert dense.config.vocab_size == 300
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-4, atol=1e-5)
