import json
import shutil

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
    base_model,
    deltas,
    edit_tensors,
    hip_config,
    leaky,
    logits,
    logits_of_stock_process,
    save_tiny_gpt2,
    saved,
    trained,
)


def stock(base_dir, folder):
    return PeftModel.from_pretrained(base_model(base_dir), folder).eval()


def assert_same_logits(found, expected, base):
    """Equal to rounding, and far from the base model's, so that equality says something."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (expected - base).abs().max() > 100 * (found - expected).abs().max() + 1e-3


# What is written


def test_stock_peft_in_a_process_without_hiplora_gives_the_same_logits(hip, tiny_model_dir, tmp_path):
    folder, model = hip
    save_as_lora(folder, tmp_path / "out")
    found = logits_of_stock_process(tiny_model_dir, tmp_path / "out", tmp_path)
    assert_same_logits(found, logits(model), logits(base_model(tiny_model_dir)))


def test_the_file_holds_lora_factors_and_nothing_else(hip, tmp_path):
    save_as_lora(hip[0], tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    expected = {
        f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_{factor}.weight"
        for layer in (0, 1)
        for name in ATTENTION
        for factor in "AB"
    }
    assert set(tensors) == expected
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_the_configuration_is_stock_at_rank_r_plus_k_and_scaling_one(hip, tmp_path):
    save_as_lora(hip[0], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 10, 10)
    assert set(config["target_modules"]) == set(ATTENTION)
    assert (
        config["base_model_name_or_path"]
        == json.loads((hip[0] / "adapter_config.json").read_text())["base_model_name_or_path"]
    )
    assert set(config) <= set(LoraConfig().to_dict()) | {"peft_version"}


def test_a_live_model_and_its_folder_export_the_same_file(hip, tmp_path):
    folder, model = hip
    save_as_lora(folder, tmp_path / "one")
    save_as_lora(model, tmp_path / "other")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "other"))
    assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def test_pefts_own_conversion_gives_the_same_update(hip, tmp_path):
    _, model = hip
    save_as_lora(model, tmp_path / "out")
    config, tensors = peft.convert_to_lora(model, rank=10)
    ours = read_update(tmp_path / "out")
    for module, (A, B) in ours.factors.items():
        theirs = (
            tensors[f"base_model.model.{module}.lora_B.weight"]
            @ tensors[f"base_model.model.{module}.lora_A.weight"]
        )
        torch.testing.assert_close(B @ A, theirs, rtol=1e-4, atol=1e-5)
    assert config.r == 10


def test_proj_lora_is_exported_at_its_own_rank(tiny_model_dir, tmp_path):
    folder, model = saved(tiny_model_dir, tmp_path / "a", hip_config(principal_channel=False))
    report = save_as_lora(folder, tmp_path / "out")
    assert set(report.ranks.values()) == {4}
    assert_same_logits(
        logits(stock(tiny_model_dir, tmp_path / "out")), logits(model), logits(base_model(tiny_model_dir))
    )


def test_ranks_that_differ_become_patterns_that_stock_peft_follows(tiny_model_dir, tmp_path):
    config = hip_config(
        rank_pattern={"q_proj": 7, "layers.1.self_attn.v_proj": 1}, principal_rank_pattern={"o_proj": 2}
    )
    folder, model = saved(tiny_model_dir, tmp_path / "a", config)
    report = save_as_lora(folder, tmp_path / "out")
    assert len(set(report.ranks.values())) == 4
    assert_same_logits(
        logits(stock(tiny_model_dir, tmp_path / "out")), logits(model), logits(base_model(tiny_model_dir))
    )


def test_only_some_layers_adapted_stay_only_some_layers(tiny_model_dir, tmp_path):
    folder, model = saved(tiny_model_dir, tmp_path / "a", hip_config(layers_to_transform=[1]))
    save_as_lora(folder, tmp_path / "out")
    loaded = stock(tiny_model_dir, tmp_path / "out")
    assert set(deltas(loaded)) == set(deltas(model))
    assert_same_logits(logits(loaded), logits(model), logits(base_model(tiny_model_dir)))


def test_an_adapted_output_head_is_exported(tmp_path):
    base = save_tiny(tmp_path / "tied", tie=True)
    folder, model = saved(base, tmp_path / "a", hip_config(target_modules=["q_proj", "lm_head"]))
    save_as_lora(folder, tmp_path / "out")
    assert_same_logits(logits(stock(base, tmp_path / "out")), logits(model), logits(base_model(base)))


@pytest.mark.filterwarnings("error:fan_in_fan_out")
def test_transposed_layers_are_exported_with_the_flag_that_stock_peft_wants(tmp_path):
    base = save_tiny_gpt2(tmp_path / "gpt2")
    folder, model = saved(base, tmp_path / "a", hip_config(target_modules=["c_attn", "c_proj", "c_fc"]))
    save_as_lora(folder, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    assert_same_logits(logits(stock(base, tmp_path / "out")), logits(model), logits(base_model(base)))


def test_modules_saved_whole_are_carried_over(tiny_model_dir, tmp_path):
    folder, model = saved(tiny_model_dir, tmp_path / "a", hip_config(modules_to_save=["lm_head"]))
    save_as_lora(folder, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"] == [
        "lm_head"
    ]
    assert_same_logits(
        logits(stock(tiny_model_dir, tmp_path / "out")), logits(model), logits(base_model(tiny_model_dir))
    )


def test_a_stock_adapter_is_exported_with_its_scaling_baked_in(tiny_model_dir, tmp_path):
    config = LoraConfig(r=4, lora_alpha=16, target_modules=ATTENTION, use_rslora=True)
    folder, model = saved(tiny_model_dir, tmp_path / "a", config)
    save_as_lora(folder, tmp_path / "out", pad_rank=8)
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["use_rslora"]) == (8, 8, False)
    assert_same_logits(
        logits(stock(tiny_model_dir, tmp_path / "out")), logits(model), logits(base_model(tiny_model_dir))
    )


def test_one_adapter_of_several_is_exported(tiny_model_dir, tmp_path):
    model = trained(tiny_model_dir, hip_config())
    model.add_adapter("second", hip_config(init_weights=False))
    save_as_lora(model, tmp_path / "second", adapter="second")
    model.set_adapter("second")
    assert_same_logits(
        logits(stock(tiny_model_dir, tmp_path / "second")), logits(model), logits(base_model(tiny_model_dir))
    )


# Padding and rounding


def test_padding_makes_every_rank_the_same_and_changes_nothing(tiny_model_dir, tmp_path):
    folder, model = saved(tiny_model_dir, tmp_path / "a", hip_config(rank_pattern={"q_proj": 9}))
    save_as_lora(folder, tmp_path / "out", pad_rank=16)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (
        16,
        16,
        {},
        {},
    )
    assert set(read_update(tmp_path / "out").ranks.values()) == {16}
    assert_same_logits(
        logits(stock(tiny_model_dir, tmp_path / "out")), logits(model), logits(base_model(tiny_model_dir))
    )


def test_a_padding_that_is_too_small_is_refused_with_the_rank_it_takes(hip, tmp_path):
    with pytest.raises(
        AdapterError, match=r"rank 10, which does not fit into --pad-rank 8; pass at least 10"
    ):
        save_as_lora(hip[0], tmp_path / "out", pad_rank=8)
    assert not (tmp_path / "out").exists()


def test_fp32_is_exact_to_rounding_and_half_precision_says_what_it_costs(hip, tmp_path):
    exact = save_as_lora(hip[0], tmp_path / "fp32")
    half = save_as_lora(hip[0], tmp_path / "bf16", dtype="bfloat16")
    assert exact.worst[1] < 1e-6
    assert exact.logits is not None
    assert exact.logits < 1e-5
    assert 1e-4 < half.worst[1] < 2e-2
    assert load_file(tmp_path / "bf16" / "adapter_model.safetensors").popitem()[1].dtype == torch.bfloat16


def test_a_value_that_overflows_half_precision_is_refused(hip, tmp_path):
    folder = shutil.copytree(hip[0], tmp_path / "a")

    def grow(tensors):
        tensors["base_model.model.model.layers.0.self_attn.q_proj.hiplora_delta"][0] = 1e7

    edit_tensors(folder, grow)
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.q_proj: lora_B in float16"):
        save_as_lora(folder, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


# Checks


def test_a_leaky_adapter_is_refused_and_nothing_is_written(tiny_model_dir, tmp_path):
    folder, module = leaky(tiny_model_dir, tmp_path / "a")
    with pytest.raises(AdapterError, match=rf"{module} leaks .* into the protected subspace.*retract_"):
        save_as_lora(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_adapter_that_promises_no_complement_is_exported(tiny_model_dir, tmp_path):
    folder, model = saved(tiny_model_dir, tmp_path / "a", hip_config(residual_projection=False))
    save_as_lora(folder, tmp_path / "out")
    assert_same_logits(
        logits(stock(tiny_model_dir, tmp_path / "out")), logits(model), logits(base_model(tiny_model_dir))
    )


@pytest.mark.parametrize("live", [False, True])
def test_an_export_over_the_tolerance_is_refused_and_nothing_is_written(hip, tmp_path, monkeypatch, live):
    def spoilt(update, folder, *options):
        write(update, folder, *options)
        edit_tensors(folder, lambda tensors: [tensor.mul_(1.001) for tensor in tensors.values()])

    write = lora.write_lora
    monkeypatch.setattr(lora, "write_lora", spoilt)
    with pytest.raises(AdapterError, match=r"differs by 2\.0e-03 of its norm, more than the tolerance 1e-05"):
        save_as_lora(hip[1] if live else hip[0], tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("live", [False, True])
def test_a_configuration_that_scales_wrongly_is_found_by_the_logits(hip, tmp_path, monkeypatch, live):
    """The tensors alone are right here: only a load by stock PEFT shows that the export is not."""

    def spoilt(update, folder, *options):
        write(update, folder, *options)
        edit_tensors(folder, lambda tensors: None)
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": ["q_proj"]}))

    write = lora.write_lora
    monkeypatch.setattr(lora, "write_lora", spoilt)
    with pytest.raises(AdapterError, match="logits differ"):
        save_as_lora(hip[1] if live else hip[0], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_exporting_a_live_model_leaves_it_as_it_was(tiny_model_dir, tmp_path):
    model = trained(tiny_model_dir, hip_config(modules_to_save=["lm_head"]))
    model.add_adapter("second", hip_config(init_weights=False))
    model.set_adapter("second")
    model.base_model.model.model.norm.weight.requires_grad_(True)
    model.train()
    before = {name: (p.data_ptr(), p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    report = save_as_lora(model, tmp_path / "out", adapter="default")
    assert report.logits is not None
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (pointer, grad, value) in before.items():
        assert (after[name].data_ptr(), after[name].requires_grad) == (pointer, grad), name
        assert torch.equal(after[name], value), name
    assert model.training
    assert model.active_adapters == ["second"]
    assert isinstance(model.peft_config["default"], hiplora.HipLoraConfig)


def test_without_a_base_model_logits_are_not_compared_and_the_report_says_why(hip, tmp_path):
    folder = shutil.copytree(hip[0], tmp_path / "a")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "nobody/nothing"}))
    report = save_as_lora(folder, tmp_path / "out")
    assert report.logits is None
    assert "nobody/nothing" in report.note


def test_logits_over_another_base_model_are_refused(hip, tmp_path):
    other = save_tiny(tmp_path / "other", seed=1)
    with pytest.raises(AdapterError, match="not the one that this adapter was made for"):
        save_as_lora(hip[0], tmp_path / "out", base=str(other))
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_exists_is_kept_unless_told_otherwise(hip, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="--overwrite"):
        save_as_lora(hip[0], tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").exists()
    save_as_lora(hip[0], tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "mine.txt").exists()


def test_an_adapter_is_never_replaced_by_its_own_export(tiny_model_dir, tmp_path):
    folder, _ = saved(tiny_model_dir, tmp_path / "runs" / "a", hip_config())
    for out in (folder, folder.parent):
        with pytest.raises(ConfigError, match="delete the adapter"):
            save_as_lora(folder, out, overwrite=True)
    assert read_update(folder).kind == "hiplora"


def test_the_report_and_the_card_say_what_was_done(hip, tmp_path):
    report = save_as_lora(hip[0], tmp_path / "out")
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["largest_difference"]["relative"] == report.worst[1]
    assert record["logit_difference"] == report.logits
    assert len(record["modules"]) == 8
    assert record["provenance"]["libraries"]["peft"] == peft.__version__
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: peft" in card
    assert record["base"] in card


def test_an_unknown_dtype_is_refused(hip, tmp_path):
    with pytest.raises(ConfigError, match=r"dtype is 'int8'.*bfloat16"):
        save_as_lora(hip[0], tmp_path / "out", dtype="int8")
