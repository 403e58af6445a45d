import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2MoeConfig, Qwen3MoeConfig

from hiplora.adapters import AdapterUpdate, lora, read_update, save_as_lora, save_dense
from hiplora.errors import AdapterError, ConfigError
from tests.tiny import left_as_it_was, save_tiny
from tests.unit.adapters.samples import (
    ATTENTION,
    assert_is,
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
def test_stock_peft_in_a_process_without_hiplora_gives_the_same_logits(adapters, tmp_path):
    save_as_lora(adapters["one"], tmp_path / "out")
    stock = logits_of_stock_process(adapters.base, tmp_path / "out", tmp_path)
    assert_same_logits(stock, logits(adapters.models["one"]), logits(base_model(adapters.base)))


def test_the_folder_is_a_stock_adapter_of_rank_r_plus_k_and_scaling_one(adapters, tmp_path):
    report = save_as_lora(adapters["one"], tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 10, 10)
    assert set(config["target_modules"]) == set(ATTENTION)
    assert config["base_model_name_or_path"] == config_of(adapters["one"])["base_model_name_or_path"]
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


@pytest.mark.parametrize("name", ["proj", "free", "one layer", "hip whole", "hip patterns", "hip head", "mlp"])
@pytest.mark.parametrize("pad", [None, 16])
def test_whatever_is_exported_gives_equal_logits(adapters, tmp_path, name, pad):
    report = save_as_lora(adapters[name], tmp_path / "out", pad_rank=pad)
    assert pad is None or {row["rank"] for row in report["modules"]} == {pad}
    assert pad is None or config_of(tmp_path / "out")["rank_pattern"] == {}
    assert_exported(adapters.base, tmp_path / "out", adapters.models[name])


def test_half_precision_says_what_it_costs_and_refuses_to_overflow(adapters, tmp_path):
    half = save_as_lora(adapters["one"], tmp_path / "bf16", dtype="bfloat16")
    assert 1e-4 < half["largest_difference"]["relative"] < 2e-2
    assert load_file(tmp_path / "bf16" / "adapter_model.safetensors").popitem()[1].dtype == torch.bfloat16
    folder = shutil.copytree(adapters["one"], tmp_path / "large")
    name = "base_model.model.model.layers.0.self_attn.q_proj.hiplora_delta.weight"
    edit_tensors(folder, lambda tensors: tensors[name].fill_(1e7))
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.q_proj: lora_B in float16"):
        save_as_lora(folder, tmp_path / "out", dtype="float16")


@pytest.mark.parametrize(
    ("scale", "config", "why"),
    [
        (1.001, {}, r"differs by 2\.0e-03 of its norm, more than the tolerance 1e-05"),
        (1.0, {"target_modules": ["q_proj"]}, "logits differ"),  # only a load by stock PEFT shows this one
    ],
)
def test_an_export_that_differs_is_refused(adapters, tmp_path, monkeypatch, scale, config, why):
    def spoilt(update, folder, *options):
        write(update, folder, *options)
        edit_tensors(folder, lambda tensors: [tensor.mul_(scale) for tensor in tensors.values()])
        edit_config(folder, **config)

    write = lora.write_lora
    monkeypatch.setattr(lora, "write_lora", spoilt)
    with pytest.raises(AdapterError, match=why):
        save_as_lora(adapters["one"], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_one_adapter_of_a_live_model_is_exported_and_the_model_left_as_it_was(tiny_model_dir, tmp_path):
    model = trained(tiny_model_dir, hip_config(modules_to_save=["lm_head"]))
    expected = logits(model)
    model.add_adapter("second", hip_config(init_weights=False))
    model.set_adapter("second")
    model.train()
    with left_as_it_was(model):
        report = save_as_lora(model, tmp_path / "out", adapter="default")
    assert (report["logit_difference"], "live model" in report["note"]) == (None, True)
    assert model.active_adapters == ["second"]
    stock = PeftModel.from_pretrained(base_model(tiny_model_dir), tmp_path / "out").eval()
    torch.testing.assert_close(logits(stock), expected, rtol=1e-5, atol=1e-5)


def test_without_a_base_model_logits_are_not_compared_and_the_report_says_why(adapters, tmp_path):
    folder = shutil.copytree(adapters["one"], tmp_path / "a")
    edit_config(folder, base_model_name_or_path="nobody/nothing")
    report = save_as_lora(folder, tmp_path / "out")
    assert report["logit_difference"] is None
    assert "nobody/nothing" in report["note"]


@pytest.mark.parametrize("name", ["one", "lora"])
def test_a_scaled_export_is_that_multiple_of_the_update(adapters, tmp_path, name):
    save_as_lora(adapters[name], tmp_path / "out", scale=0.25)
    before = read_update(adapters[name])
    assert_is(read_update(tmp_path / "out"), {module: 0.25 * product(before, module) for module in before.factors})


def test_what_cannot_be_exported_is_refused_and_nothing_written(adapters, tmp_path):
    stray = shutil.copytree(adapters["lora"], tmp_path / "stray")
    other = str(save_tiny(tmp_path / "other", seed=1))

    def rename(tensors):
        for name in [name for name in tensors if "layers.0" in name]:
            tensors[name.replace("self_attn", "self_attx")] = tensors.pop(name)

    edit_tensors(stray, rename)
    for folder, options, error, why in (
        (stray, {}, AdapterError, r"has no linear layer model\.layers\.0\.self_attx\.k_proj"),
        (adapters["one"], {"pad_rank": 8}, ConfigError, r"rank 10, which does not fit .* pass at least 10"),
        (adapters["one"], {"base": other}, AdapterError, "not the one that this adapter was made for"),
        (adapters["whole"], {"scale": 0.5}, AdapterError, r"lm_head\.weight.*cannot be scaled"),
        (adapters["one"], {"scale": 0}, ConfigError, "scale is 0; expected a number above 0"),
        (adapters["one"], {"dtype": "int8"}, ConfigError, r"dtype is 'int8'.*bfloat16"),
    ):
        with pytest.raises(error, match=why):
            save_as_lora(folder, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()


def test_a_prefix_renames_the_modules_for_servers_of_multimodal_checkpoints(adapters, tmp_path):
    report = save_as_lora(adapters["one"], tmp_path / "out", prefix="model.language_model")
    assert report["logit_difference"] is None
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in names)
    assert all(name.startswith("model.language_model.") for name in config_of(tmp_path / "out")["target_modules"])
    other = AdapterUpdate("", "lora", {}, {"transformer.h.0.attn.c_attn": (torch.ones(1, 4), torch.ones(4, 1))})
    with pytest.raises(ConfigError, match=r"no adapted module has one, such as transformer\.h\.0.*leave it out"):
        save_as_lora(other, tmp_path / "none", prefix="model.language_model")


SIZES = {"hidden_size": 32, "vocab_size": 259, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
SIZES |= {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "intermediate_size": 64}
SHARED = Qwen2MoeConfig(**SIZES, num_hidden_layers=1, num_experts=3, shared_expert_intermediate_size=16)
# PEFT would take the first layer, which is dense, for experts: it is exported by its weight's name.
DENSE_FIRST = Qwen3MoeConfig(**SIZES, num_hidden_layers=2, num_experts=2, mlp_only_layers=[0])
OF_FIRST = {"rank_pattern": {"0.mlp.down_proj": 5}, "alpha_pattern": {"0.mlp.down_proj": 1}}


@pytest.mark.parametrize(
    ("kind", "targets", "patterns"),
    [
        (SHARED, ["down_proj", "gate_up_proj", "q_proj"], {"rank_pattern": {"experts.down_proj.1": 5}}),
        (DENSE_FIRST, ["down_proj"], OF_FIRST),
        (DENSE_FIRST, ["down_proj", "gate_up_proj", "gate_proj", "up_proj", "q_proj"], OF_FIRST),
    ],
    ids=["beside a shared one", "one projection", "all"],
)
def test_experts_are_exported_for_stock_peft_padded_too(tmp_path, kind, targets, patterns):
    base, out = tmp_path / "moe", tmp_path / "out"
    AutoModelForCausalLM.from_config(kind).save_pretrained(base)
    folder, model = saved(base, tmp_path / "a", hip_config(r=2, principal_rank=2, target_modules=targets, **patterns))
    for source, pad in ((folder, None), (folder, 9), (model, None)):
        save_as_lora(source, out, pad_rank=pad, overwrite=True)
        stock = PeftModel.from_pretrained(base_model(base), out).eval()
        torch.testing.assert_close(logits(stock), logits(model), rtol=1e-4, atol=1e-5)
        save_as_lora(out, tmp_path / "again", overwrite=True)  # its record compares logits
    save_dense(folder, tmp_path / "dense")
    torch.testing.assert_close(logits(base_model(tmp_path / "dense")), logits(model), rtol=1e-4, atol=1e-5)


def test_some_experts_of_a_projection_alone_have_no_plain_lora(tmp_path):
    pair = torch.randn(2, 8), torch.randn(8, 2)
    update = AdapterUpdate("", "lora", {}, {f"model.layers.0.mlp.experts.down_proj.{i}": pair for i in (0, 2)})
    with pytest.raises(AdapterError, match=r"down_proj\.1: is not adapted.*--to dense"):
        save_as_lora(update, tmp_path / "out")


def test_modules_that_a_pattern_would_not_select_are_named(adapters, tmp_path):
    folder = shutil.copytree(adapters["proj of q"], tmp_path / "a")
    edit_config(folder, target_modules="all-linear")
    save_as_lora(folder, tmp_path / "out")
    assert config_of(tmp_path / "out")["target_modules"] == ["q_proj"]
    assert_exported(adapters.base, tmp_path / "out", adapters.models["proj of q"])


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
