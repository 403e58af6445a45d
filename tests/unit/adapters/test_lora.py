import json

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

import hiplora
from hiplora.adapters import lora, read_update, save_as_lora
from hiplora.errors import AdapterError, ConfigError
from tests.tiny import save_tiny
from tests.unit.adapters.samples import (
    ATTENTION,
    adalora,
    base_model,
    deltas,
    edit_config,
    edit_tensors,
    hip_config,
    leaky,
    logits,
    logits_of_stock_process,
    save_tiny_gpt2,
    saved,
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


def test_the_old_name_still_exports(hip, tmp_path):
    assert hiplora.export.save_as_lora(hip[0], tmp_path / "out").worst[1] < 1e-6


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
    assert record["largest_difference"]["relative"] == report.worst[1] < 1e-6
    assert record["logit_difference"] == report.logits < 1e-5
    assert record["provenance"]["libraries"]["peft"] == peft.__version__
    assert record["base"] in (tmp_path / "out" / "README.md").read_text()


def test_a_live_model_and_its_folder_export_the_same_file(hip, tmp_path):
    for name, source in zip(("one", "other"), hip, strict=True):
        save_as_lora(source, tmp_path / name)
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "other"))
    assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


@pytest.mark.parametrize(
    "config",
    [
        hip_config(principal_channel=False),
        hip_config(residual_projection=False),
        hip_config(layers_to_transform=[1]),
        hip_config(modules_to_save=["lm_head"]),
        hip_config(rank_pattern={"q_proj": 7, "layers.1.self_attn.v_proj": 1}, principal_rank_pattern={"o_proj": 2}),
        LoraConfig(r=4, lora_alpha=16, target_modules=ATTENTION, use_rslora=True),
    ],
)
@pytest.mark.parametrize("pad", [None, 16])
def test_whatever_is_exported_gives_equal_logits(tiny_model_dir, tmp_path, config, pad):
    folder, model = saved(tiny_model_dir, tmp_path / "a", config)
    report = save_as_lora(folder, tmp_path / "out", pad_rank=pad)
    assert pad is None or set(report.ranks.values()) == {pad}
    assert pad is None or config_of(tmp_path / "out")["rank_pattern"] == {}
    assert_exported(tiny_model_dir, tmp_path / "out", model)


def test_adalora_is_exported(tiny_model_dir, tmp_path):
    model = adalora(tiny_model_dir)
    save_as_lora(model, tmp_path / "out", check_logits=False)
    assert_exported(tiny_model_dir, tmp_path / "out", model)


def test_an_adapted_output_head_and_transposed_layers_are_exported(tmp_path):
    tied = save_tiny(tmp_path / "tied", tie=True)
    folder, model = saved(tied, tmp_path / "a", hip_config(target_modules=["q_proj", "lm_head"]))
    save_as_lora(folder, tmp_path / "out")
    assert_exported(tied, tmp_path / "out", model)
    gpt2 = save_tiny_gpt2(tmp_path / "gpt2")
    folder, model = saved(gpt2, tmp_path / "b", hip_config(target_modules=["c_attn", "c_proj", "c_fc"]))
    save_as_lora(folder, tmp_path / "transposed")
    assert config_of(tmp_path / "transposed")["fan_in_fan_out"] is True
    assert_exported(gpt2, tmp_path / "transposed", model)


def test_a_padding_that_is_too_small_is_refused_with_the_rank_it_takes(hip, tmp_path):
    with pytest.raises(AdapterError, match=r"rank 10, which does not fit .* pass at least 10"):
        save_as_lora(hip[0], tmp_path / "out", pad_rank=8)
    assert not list(tmp_path.iterdir())


def test_half_precision_says_what_it_costs_and_refuses_to_overflow(tiny_model_dir, tmp_path):
    folder, _ = saved(tiny_model_dir, tmp_path / "a", hip_config())
    half = save_as_lora(folder, tmp_path / "bf16", dtype="bfloat16")
    assert 1e-4 < half.worst[1] < 2e-2
    assert load_file(tmp_path / "bf16" / "adapter_model.safetensors").popitem()[1].dtype == torch.bfloat16
    name = "base_model.model.model.layers.0.self_attn.q_proj.hiplora_delta.weight"
    edit_tensors(folder, lambda tensors: tensors[name].fill_(1e7))
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.q_proj: lora_B in float16"):
        save_as_lora(folder, tmp_path / "out", dtype="float16")
    with pytest.raises(ConfigError, match=r"dtype is 'int8'.*bfloat16"):
        save_as_lora(folder, tmp_path / "out", dtype="int8")


def test_a_leaky_adapter_is_refused_and_nothing_is_written(tiny_model_dir, tmp_path):
    folder, module = leaky(tiny_model_dir, tmp_path / "a")
    with pytest.raises(AdapterError, match=rf"{module} leaks .* into the protected subspace.*retract_"):
        save_as_lora(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


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
    assert (report.logits, "live model" in report.note) == (None, True)
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
    assert report.logits is None
    assert "nobody/nothing" in report.note
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
