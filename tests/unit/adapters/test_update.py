import dataclasses
import json
import shutil

import peft
import pytest
import torch
from peft import LoraConfig

from hiplora.adapters import read_update, update_from_model
from hiplora.errors import AdapterError
from hiplora.spectral import FactorStore
from tests.tiny import save_tiny
from tests.unit.adapters.samples import (
    ATTENTION,
    base_model,
    deltas,
    edit_tensors,
    hip_config,
    product,
    save_tiny_gpt2,
    saved,
    train,
    trained,
)

Q0 = "model.layers.0.self_attn.q_proj"


def assert_update_is(update, expected):
    assert set(update.factors) == set(expected)
    for module, delta in expected.items():
        assert delta.norm() > 0
        torch.testing.assert_close(product(update, module), delta, rtol=1e-5, atol=1e-6)


def edit_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# HiP-LoRA


def test_a_hiplora_folder_is_read_as_the_update_that_its_model_makes(hip):
    folder, model = hip
    update = read_update(folder)
    assert update.kind == "hiplora"
    assert set(update.ranks.values()) == {4 + 6}
    assert_update_is(update, deltas(model))


def test_a_live_model_and_its_folder_give_bit_equal_factors(hip):
    folder, model = hip
    live, stored = update_from_model(model), read_update(folder)
    assert live.fingerprints == stored.fingerprints
    for module in stored.factors:
        for one, other in zip(live.factors[module], stored.factors[module], strict=True):
            assert torch.equal(one, other)


def test_proj_lora_has_the_residual_rank_only(tiny_model_dir, tmp_path):
    folder, model = saved(tiny_model_dir, tmp_path / "a", hip_config(principal_channel=False))
    update = read_update(folder)
    assert update.kind == "proj-lora"
    assert set(update.ranks.values()) == {4}
    assert_update_is(update, deltas(model))


def test_patterns_of_rank_alpha_and_principal_rank_are_followed(tiny_model_dir, tmp_path):
    config = hip_config(
        rank_pattern={"q_proj": 7}, alpha_pattern={"k_proj": 2}, principal_rank_pattern={"o_proj": 3}
    )
    folder, model = saved(tiny_model_dir, tmp_path / "a", config)
    update = read_update(folder)
    assert {name.rpartition(".")[2]: rank for name, rank in update.ranks.items()} == {
        "q_proj": 13,
        "k_proj": 10,
        "v_proj": 10,
        "o_proj": 7,
    }
    assert_update_is(update, deltas(model))


def test_factors_that_were_not_saved_come_from_the_base_model(tiny_model_dir, tmp_path):
    folder, model = saved(tiny_model_dir, tmp_path / "a", hip_config(save_factors=False))
    update = read_update(folder)
    assert update.channels[Q0].U.shape == (64, 6)
    assert_update_is(update, deltas(model))


def test_recomputed_factors_that_differ_by_rounding_leave_no_leak(tiny_model_dir, tmp_path, monkeypatch):
    """Another machine's decomposition differs within the tolerance; the layer retracts on load, and so does this."""
    folder, _ = saved(tiny_model_dir, tmp_path / "a", hip_config(save_factors=False))
    exact = FactorStore.get_or_compute

    def rounded(self, weight, *arguments, **options):
        factors = exact(self, weight, *arguments, **options)
        U = torch.linalg.qr(factors.U + 1e-3 * torch.randn_like(factors.U)).Q
        return dataclasses.replace(factors, U=U)

    monkeypatch.setattr(FactorStore, "get_or_compute", rounded)
    assert max(channels.leak() for channels in read_update(folder).channels.values()) < 1e-5


def test_factors_are_not_recomputed_from_another_base_model(tiny_model_dir, tmp_path):
    folder, _ = saved(tiny_model_dir, tmp_path / "a", hip_config(save_factors=False))
    other = save_tiny(tmp_path / "other", seed=1)
    with pytest.raises(AdapterError, match=r"model\.layers\.0\.self_attn\.k_proj.*not the one.*--base"):
        read_update(folder, base=str(other))


def test_factors_of_another_basis_are_not_recomputed_from_the_weights_alone(tiny_model_dir, tmp_path):
    folder, _ = saved(tiny_model_dir, tmp_path / "a", hip_config(save_factors=False))
    edit_config(folder, basis="activation")
    with pytest.raises(AdapterError, match=r"basis 'activation' cannot be recomputed.*save_factors=True"):
        read_update(folder)


def test_factors_of_a_bf16_base_are_recomputed_from_its_fp32_checkpoint(tiny_model_dir, tmp_path):
    folder, model = saved(
        tiny_model_dir, tmp_path / "a", hip_config(save_factors=False), dtype=torch.bfloat16
    )
    assert_update_is(read_update(folder), deltas(model))


def test_transposed_layers_are_read_as_out_by_in(tmp_path):
    base = save_tiny_gpt2(tmp_path / "gpt2")
    folder, model = saved(base, tmp_path / "a", hip_config(target_modules=["c_attn", "c_proj"]))
    update = read_update(folder)
    assert product(update, "transformer.h.0.attn.c_attn").shape == (96, 32)
    assert_update_is(update, deltas(model))


def test_modules_saved_whole_are_kept_beside_the_factors(tiny_model_dir, tmp_path):
    folder, model = saved(tiny_model_dir, tmp_path / "a", hip_config(modules_to_save=["norm"]))
    update = read_update(folder)
    # PEFT takes every module whose name ends so.
    assert {name.rsplit(".", 2)[1] for name in update.extras} == {
        "norm",
        "input_layernorm",
        "post_attention_layernorm",
    }
    weight = model.base_model.model.model.norm.modules_to_save["default"].weight
    assert torch.equal(update.extras["model.norm.weight"], weight)
    assert torch.equal(update_from_model(model).extras["model.norm.weight"], weight)


# Stock LoRA


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora_alpha": 3},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 5}},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
    ],
)
def test_a_stock_lora_adapter_is_read_as_the_update_that_peft_makes(tiny_model_dir, tmp_path, changes):
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ATTENTION} | changes)
    folder, model = saved(tiny_model_dir, tmp_path / "a", config)
    update = read_update(folder)
    assert update.kind == "lora"
    assert_update_is(update, deltas(model))
    assert_update_is(update_from_model(model), deltas(model))


def test_pissa_is_read_as_the_difference_that_peft_saves(tiny_model_dir, tmp_path):
    torch.manual_seed(0)
    start = base_model(tiny_model_dir)
    model = peft.get_peft_model(
        start, LoraConfig(r=4, lora_alpha=4, target_modules=ATTENTION, init_lora_weights="pissa")
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    train(model)
    model.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=tmp_path / "start")
    update = read_update(tmp_path / "a")
    merged = model.merge_and_unload().state_dict()
    original = base_model(tiny_model_dir).state_dict()
    assert_update_is(update, {m: merged[f"{m}.weight"] - original[f"{m}.weight"] for m in update.factors})


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_whose_start_moved_the_base_weights_is_refused_with_the_way_out(
    tiny_model_dir, tmp_path, start
):
    folder, _ = saved(tiny_model_dir, tmp_path / "a", LoraConfig(r=4, target_modules=ATTENTION))
    edit_config(folder, init_lora_weights=start)
    with pytest.raises(
        AdapterError, match=f"init_lora_weights='{start}'.*path_initial_model_for_weight_conversion"
    ):
        read_update(folder)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LoraConfig(target_modules=ATTENTION, use_dora=True), "DoRA"),
        (LoraConfig(target_modules=ATTENTION, trainable_token_indices=[1, 2]), "token"),
        (LoraConfig(target_modules=["embed_tokens"]), "embed_tokens"),
        (LoraConfig(target_modules=ATTENTION, bias="all"), "bias"),
        (
            LoraConfig(target_modules=[], target_parameters=["model.layers.0.self_attn.q_proj.weight"]),
            "parameters",
        ),
    ],
)
def test_what_is_not_a_plain_update_is_refused_and_named(tiny_model_dir, tmp_path, config, reason):
    model = peft.get_peft_model(base_model(tiny_model_dir), config)
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterError, match=reason):
        read_update(tmp_path / "a")


def test_the_copy_of_an_adapted_output_heads_weight_is_not_part_of_the_update(tiny_model_dir, tmp_path):
    folder, model = saved(
        tiny_model_dir, tmp_path / "a", LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    )
    update = read_update(folder)
    assert not update.extras
    assert_update_is(update, deltas(model))


def test_an_adapter_of_another_method_is_refused(tiny_model_dir, tmp_path):
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    peft.get_peft_model(base_model(tiny_model_dir), config).save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterError, match="IA3"):
        read_update(tmp_path / "a")


# Damage


@pytest.fixture(params=["hiplora", "lora"])
def folder(request, tiny_model_dir, tmp_path):
    config = hip_config() if request.param == "hiplora" else LoraConfig(r=4, target_modules=ATTENTION)
    return saved(tiny_model_dir, tmp_path / request.param, config)[0]


def factor_names(folder):
    kind = json.loads((folder / "adapter_config.json").read_text())["peft_type"]
    parts = ["A", "B", "delta", "U", "sigma", "V"] if kind == "HIPLORA" else ["A.weight", "B.weight"]
    return [f"{Q0}.{'hiplora' if kind == 'HIPLORA' else 'lora'}_{part}" for part in parts]


def test_a_cut_off_file_is_named(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: damaged or cut off"):
        read_update(folder)


def test_every_missing_tensor_is_named(folder):
    whole = (folder / "adapter_model.safetensors").read_bytes()
    for name in factor_names(folder):
        edit_tensors(folder, lambda tensors, name=name: tensors.pop(f"base_model.model.{name}"))
        with pytest.raises(AdapterError, match=f"tensor {name} is missing"):
            read_update(folder)
        (folder / "adapter_model.safetensors").write_bytes(whole)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_named_with_file_and_tensor(folder, bad):
    name = factor_names(folder)[1]

    def spoil(tensors):
        tensors[f"base_model.model.{name}"][0, 0] = bad

    edit_tensors(folder, spoil)
    with pytest.raises(AdapterError, match=rf"adapter_model\.safetensors: tensor {name}: 1 of \d+ values"):
        read_update(folder)


def test_a_tensor_of_the_wrong_shape_is_named(folder):
    name = factor_names(folder)[0]

    def cut(tensors):
        tensors[f"base_model.model.{name}"] = tensors[f"base_model.model.{name}"][:-1]

    edit_tensors(folder, cut)
    with pytest.raises(AdapterError, match=Q0):
        read_update(folder)


@pytest.mark.parametrize("part", ["B", "delta", "U", "sigma", "V"])
def test_every_tensor_of_the_wrong_shape_is_named_with_the_right_one(hip, tmp_path, part):
    folder = shutil.copytree(hip[0], tmp_path / "a")

    def cut(tensors):
        tensors[f"base_model.model.{Q0}.hiplora_{part}"] = tensors[f"base_model.model.{Q0}.hiplora_{part}"][
            ..., :-1
        ]

    edit_tensors(folder, cut)
    with pytest.raises(AdapterError, match=rf"tensor {Q0}\.hiplora_{part} is \(.*\), expected \("):
        read_update(folder)


def test_a_module_that_the_configuration_lists_and_the_file_lacks_is_named(hip, tmp_path):
    folder = shutil.copytree(hip[0], tmp_path / "a")

    def drop(tensors):
        for name in [name for name in tensors if Q0 in name]:
            tensors.pop(name)

    edit_tensors(folder, drop)
    with pytest.raises(AdapterError, match=f"{Q0}.hiplora_A is missing"):
        read_update(folder)


def test_a_configuration_of_another_adapter_is_noticed(folder):
    edit_config(folder, r=5)
    with pytest.raises(AdapterError, match=r"rank 4, but the configuration says 5"):
        read_update(folder)


def test_a_configuration_that_is_not_json_is_named(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": ')
    with pytest.raises(AdapterError, match=r"adapter_config\.json: not valid JSON"):
        read_update(folder)


def test_a_folder_without_an_adapter_is_said(tmp_path):
    with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
        read_update(tmp_path)


def test_an_adapter_name_that_the_model_lacks_is_said(hip):
    with pytest.raises(AdapterError, match=r"'other'.*'default'"):
        update_from_model(hip[1], "other")


def test_a_live_model_that_diverged_is_refused(tiny_model_dir):
    model = trained(tiny_model_dir, hip_config())
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "hiplora_B" in n).fill_(float("nan"))
    with pytest.raises(AdapterError, match="NaN"):
        update_from_model(model)
