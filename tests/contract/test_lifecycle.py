"""What PEFT's users do with an adapter, from making it to merging it."""

import json
import re
import subprocess
import sys
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import hiplora
from hiplora.errors import AdapterError, FactorError
from hiplora.spectral import factors
from hiplora.tuner import HipLoraLinear, hip_layers, model_fingerprint, sampled_rows
from hiplora.tuner.moments import base_only
from tests.contract.conftest import ACTIVATION, Base, logits, train
from tests.tiny import tiny_llama


def base_weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "hiplora_" not in n}


def test_leak_and_merge_are_exact_under_autocast_and_a_cast_model_unmerges_in_its_new_dtype(tiny, ids):
    model = tiny.adapted(init_weights=False)
    before = logits(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        assert hiplora.max_leak(model) < 1e-6
        model.merge_adapter()
    assert (logits(model, ids) - before).abs().max() < 1e-4
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert logits(model, ids).dtype == torch.bfloat16


def test_gains_that_a_checkpoint_brings_raise_no_alarm(tiny, ids):
    model, trained = (tiny.trained(ids), tiny.adapted())
    model.train()(ids, labels=ids).loss.backward()
    model.load_state_dict(trained.state_dict())
    torch.testing.assert_close(logits(model, ids), logits(trained, ids))
    model.train()(ids)


def test_a_state_dict_brings_its_basis_and_what_left_the_complement(tiny, ids):
    models = []
    for rows in (20, 40):
        config = tiny.config(basis="activation", stability_weight=50.0, principal_channel=True)
        hiplora.calibrate(tiny.make(), config, rows=torch.randint(0, 256, (rows, 16)))
        models.append(peft.get_peft_model(tiny.make(), config))
    one, other = models
    train(other, ids, steps=1)
    with torch.no_grad():  # as an optimizer of flat or master copies does
        for _, layer in hip_layers(one):
            layer.hiplora_B["default"].normal_(std=0.1)
            layer.hiplora_delta["default"].normal_(std=0.1)
    one.train()(ids)
    one.eval()
    other.load_state_dict(one.state_dict())
    assert hiplora.max_leak(one) > 0.1
    assert torch.equal(logits(other, ids), logits(one, ids))
    assert torch.equal(hiplora.stability_penalty(other), hiplora.stability_penalty(one))


def test_a_state_dict_of_the_trainable_parameters_is_enough_to_save(base, ids, tmp_path):
    model = base.adapted(init_weights=False)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained(tmp_path, state_dict=trained)
    loaded = peft.PeftModel.from_pretrained(base.make(), tmp_path)
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids))


def test_the_base_that_is_sampled_from_is_without_trained_copies_of_modules(tiny, ids):
    model = tiny.adapted(modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(1.0)
    with base_only(model):
        assert torch.equal(model(ids).logits, logits(tiny.make(), ids))
    assert model_fingerprint(model.get_base_model()) == model_fingerprint(tiny.make())


def test_a_new_adapter_changes_nothing_and_only_it_is_trained(base, ids):
    reference, model = logits(base.make(), ids), base.adapted()
    assert torch.equal(logits(model, ids), reference)
    trained = {n.partition("hiplora_")[2].partition(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"A", "B", "delta"}
    before = base_weights(model)
    losses = train(model, ids)
    assert losses[-1] < losses[0]
    for name, weight in base_weights(model).items():
        assert torch.equal(weight, before[name]), name
    assert not torch.equal(logits(model, ids), reference)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), reference)


READER = """
import sys, torch, peft, hiplora
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
base, loaded = (AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/base').eval() for _ in range(2))
model = peft.PeftModel.from_pretrained(base, sys.argv[1] + '/adapter').eval()
loaded.load_adapter(sys.argv[1] + '/adapter')
ids, expected = torch.load(sys.argv[1] + '/expected.pt')
with torch.no_grad():
    assert torch.equal(model(input_ids=ids).logits, expected)
    for one in (loaded, model):  # transformers' model before its first pass
        compiled = torch.compile(one, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(input_ids=ids).logits, expected)
"""


@pytest.mark.slow
@pytest.mark.parametrize("save_factors", [True, False])
def test_a_saved_adapter_gives_equal_logits_in_another_process_and_compiles_without_a_break(
    tiny, ids, tmp_path, save_factors
):
    tiny.make().save_pretrained(tmp_path / "base")
    model = tiny.trained(ids, save_factors=save_factors)
    model.save_pretrained(tmp_path / "adapter")
    torch.save((ids, logits(model, ids)), tmp_path / "expected.pt")
    command = [sys.executable, "-W", "ignore", "-c", READER, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("order", ["import hiplora, peft", "import peft, hiplora", "import hiplora.tuner.layer, peft"])
def test_importing_hiplora_registers_it_whatever_the_order(order):
    code = f"{order}; from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as known; assert 'HIPLORA' in known"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.slow
def test_without_hiplora_a_load_fails_loudly_and_the_folder_says_what_to_do(tiny, tmp_path):
    tiny.make().save_pretrained(tmp_path / "base")
    tiny.adapted().save_pretrained(tmp_path / "adapter")
    code = READER.replace(", hiplora", "")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode != 0
    assert "HIPLORA" in done.stderr
    for file in ("README.md", "adapter_config.json"):
        said = (tmp_path / "adapter" / file).read_text()
        assert "pip install hiplora" in said
        assert "import hiplora" in said


def test_loading_over_another_weight_names_the_module_and_leaves_the_base_alone(base, ids, tmp_path):
    model = base.adapted()
    model.save_pretrained(tmp_path)
    other = base.make()
    name, _ = next(iter(hip_layers(model)))
    with torch.no_grad():
        other.get_submodule(name).weight[0, 0] += 1e-3
    reference = logits(other, ids)
    with pytest.raises(AdapterError, match=name.replace(".", r"\.")):
        peft.PeftModel.from_pretrained(other, tmp_path)
    assert torch.equal(logits(other, ids), reference)
    assert not any(isinstance(m, HipLoraLinear) for m in other.modules())


def test_loading_compares_a_sample_of_the_weights_and_all_values_on_request(tiny, ids, tmp_path, monkeypatch):
    monkeypatch.setattr(factors, "_SAMPLED", 1)  # the two diagonals, as of a large weight
    tiny.trained(ids).save_pretrained(str(tmp_path))
    model = peft.PeftModel.from_pretrained(tiny.make(), str(tmp_path))
    hiplora.verify_base(model)
    other = tiny.make()
    other.get_parameter("model.layers.1.self_attn.v_proj.weight").data[0, 1] += 1e-3  # on none of them
    model = peft.PeftModel.from_pretrained(other, str(tmp_path))
    with pytest.raises(AdapterError, match=r"layers\.1\.self_attn\.v_proj: the base model's weight is not the one"):
        hiplora.verify_base(model)
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {"weight_samples": {}}  # as 0.1 wrote it
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"layers\.1\.self_attn\.v_proj: the base model's weight is not the one"):
        peft.PeftModel.from_pretrained(other, str(tmp_path))


def test_a_base_in_another_precision_is_accepted_with_a_warning_but_no_other_weight(base, ids, tmp_path):
    model = base.trained(ids)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="another precision"):
        half = peft.PeftModel.from_pretrained(base.make(torch.bfloat16), tmp_path)
    with half.disable_adapter(), model.disable_adapter():
        rounding = (logits(half, ids) - logits(model, ids)).norm()  # what bf16 changes without an adapter
    assert (logits(half, ids) - logits(model, ids)).norm() < 4 * rounding
    other, (name, _) = base.make(torch.bfloat16), next(iter(hip_layers(model)))
    with torch.no_grad():
        other.get_submodule(name).weight.normal_(std=0.02)
    with pytest.raises(AdapterError, match=re.escape(name)):
        peft.PeftModel.from_pretrained(other, tmp_path)


def test_a_second_adapter_can_be_added_switched_disabled_and_deleted(base, ids):
    model = base.trained(ids)
    first = logits(model, ids)
    model.add_adapter("second", base.config(r=2, principal_rank=4, lora_alpha=8))
    assert torch.equal(logits(model, ids), first)
    model.set_adapter("second")
    assert torch.equal(logits(model, ids), logits(base.make(), ids))
    train(model, ids)
    second = logits(model, ids)
    assert not torch.equal(second, first)
    for name, expected in (("default", first), ("second", second)):
        model.set_adapter(name)
        assert torch.equal(logits(model, ids), expected)
    model.delete_adapter("default")
    assert torch.equal(logits(model, ids), second)
    assert all("default" not in layer.hiplora_U for _, layer in hip_layers(model))


@pytest.mark.parametrize("how", ["add", "calibrate"])
@pytest.mark.parametrize("basis", ["weight", "activation"])
def test_nothing_is_measured_on_weights_that_an_adapter_is_merged_into(tiny, basis, how):
    model, config = tiny.adapted(), tiny.config(basis=basis, principal_rank=6)
    model.merge_adapter()
    with pytest.raises(AdapterError, match="another adapter is merged into it; call unmerge_adapter"):
        if how == "add":
            model.add_adapter("second", config)
        else:
            sampled_rows(model, 40)
    model.unmerge_adapter()
    model.add_adapter("second", config)


def test_a_deleted_adapters_name_can_be_used_for_another_kind(tiny, ids):
    model = tiny.adapted(init_weights=False)
    model(input_ids=ids)  # with gradients: the factors may now be trained by anyone
    model.add_adapter("other", tiny.config())
    model.delete_adapter("default")
    model.add_adapter("default", tiny.config(residual_projection=False, init_weights=False))
    model.set_adapter("default")
    before = logits(model, ids)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, ids), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("save_factors", [True, False])
def test_a_second_adapter_can_be_loaded_beside_the_first(base, ids, tmp_path, save_factors, low_memory):
    save_factors = save_factors or base.kind in ACTIVATION
    model = base.trained(ids, save_factors=save_factors)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    fresh = base.adapted(save_factors=save_factors)
    assert not fresh.load_adapter(tmp_path, "loaded", low_cpu_mem_usage=low_memory).missing_keys
    fresh.set_adapter("loaded")
    assert torch.equal(logits(fresh, ids), expected)
    for _, layer in hip_layers(fresh):
        assert layer.hiplora_U["default"].data_ptr() == layer.hiplora_U["loaded"].data_ptr()


def test_a_model_whose_adapters_were_all_deleted_has_none(tiny):
    model = tiny.adapted()
    model.delete_adapter("default")
    with pytest.raises(AdapterError, match="the model has no HiP-LoRA adapter"):
        hiplora.max_leak(model)


def test_two_active_adapters_share_the_memory_of_their_basis_and_add_up(tiny, ids):
    model = tiny.trained(ids)
    model.add_adapter("second", tiny.config())
    for moved in (model, model.to(torch.float64).to(torch.float32)):
        for _, layer in hip_layers(moved):
            for held in (layer.hiplora_U, layer.hiplora_V):
                assert held["default"].data_ptr() == held["second"].data_ptr()
    model.set_adapter("second")
    train(model, ids)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model, ids)
    merged = model.merge_and_unload()
    assert (logits(merged, ids) - both).norm() <= 1e-5 * both.norm()


@pytest.mark.parametrize("safe", [True, False])
def test_merging_keeps_the_output_and_unmerging_restores_every_bit(base, ids, safe):
    model = base.adapted()
    weights = base_weights(model)
    train(model, ids)
    expected = logits(model, ids)
    model.merge_adapter(safe_merge=safe)
    assert (logits(model, ids) - expected).norm() <= 1e-5 * expected.norm()
    model.unmerge_adapter()
    assert torch.equal(logits(model, ids), expected)
    for name, weight in base_weights(model).items():
        assert torch.equal(weight, weights[name]), name
    plain = model.merge_and_unload(safe_merge=safe)
    assert (logits(plain, ids) - expected).norm() <= 1e-5 * expected.norm()
    assert not any(isinstance(module, HipLoraLinear) for module in plain.modules())


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_an_adapted_head_is_saved_without_the_base_models_and_merged_beside_the_embedding(ids, tmp_path, kind):
    base = Base(kind)
    model = base.trained(ids, target_modules=["lm_head", "q_proj"])
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    assert not any("base_layer" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base.make(), tmp_path), ids), expected)
    embedding = model.get_input_embeddings().weight.detach().clone()
    plain = model.merge_and_unload()
    assert (logits(plain, ids) - expected).norm() <= 1e-5 * expected.norm()
    assert torch.equal(plain.get_input_embeddings().weight, embedding)


def test_what_is_not_finite_is_neither_merged_nor_saved(tiny, tmp_path):
    model = tiny.adapted()
    name, layer = next(iter(hip_layers(model)))
    weight = layer.get_base_layer().weight
    layer.hiplora_delta["default"].data[0] = float("inf")
    with pytest.raises(AdapterError, match=re.escape(name)):
        model.merge_adapter(safe_merge=True)
    assert layer.get_base_layer().weight is weight
    with pytest.raises(AdapterError, match=f"{re.escape(name)}.*NaN.*learning rate"):
        model.save_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_modules_to_save_are_trained_saved_and_loaded(tiny, ids, tmp_path, low_cpu_mem_usage):
    model = tiny.trained(ids, modules_to_save=["norm"])
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert any(key.endswith("model.norm.weight") for key in keys)
    loaded = peft.PeftModel.from_pretrained(tiny.make(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


@pytest.mark.parametrize("basis", ["weight", "activation"])
def test_a_config_object_can_be_used_for_two_models(tiny, ids, tmp_path, basis):
    config = tiny.config(basis=basis)
    if basis == "activation":
        hiplora.calibrate(tiny.make(), config, rows=torch.randint(0, 256, (20, 16)), source="my rows")
    first = peft.get_peft_model(tiny.make(), config)
    calibration = dict(config.calibration)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        second = peft.get_peft_model(tiny_llama(seed=5), config)
    assert any("calibrated on my rows" in str(one.message) for one in caught) == (basis == "activation")
    assert first.peft_config["default"].calibration == calibration
    for seed, model in ((0, first), (5, second)):
        train(model, ids)
        model.save_pretrained(tmp_path / str(seed))
        loaded = peft.PeftModel.from_pretrained(tiny_llama(seed), tmp_path / str(seed))
        assert torch.equal(logits(loaded, ids), logits(model, ids))


@pytest.mark.parametrize("how", ["a file", "a state dict", "a configuration"])
def test_an_adapter_that_was_made_here_takes_no_factors_of_another_base(tiny, ids, tmp_path, how):
    trained = tiny.adapted(init_weights=False)
    trained.save_pretrained(tmp_path)

    def load(seed):
        config = tiny.config(principal_rank=8)
        if how == "a configuration":
            return peft.PeftModel.from_pretrained(tiny_llama(seed), tmp_path, config=config)
        model = peft.get_peft_model(tiny_llama(seed), config)
        if how == "a file":
            model.load_adapter(tmp_path, "default")
        else:
            peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(trained))
        return model

    assert torch.equal(logits(load(0), ids), logits(trained, ids))
    with pytest.raises(AdapterError, match=r"q_proj: the base model's weight is not the one"):
        load(5)


@pytest.mark.parametrize("rank", [8, "energy:0.9"])
@pytest.mark.parametrize("basis", ["weight", "activation"])
def test_a_base_without_values_is_refused_by_name(tiny, tmp_path, basis, rank):
    with torch.device("meta"):
        empty = tiny.make()
    with pytest.raises(FactorError, match=r"layer model\..*meta device"):
        peft.get_peft_model(empty, tiny.config(basis=basis, principal_rank=rank), low_cpu_mem_usage=True)
    tiny.adapted().save_pretrained(tmp_path)
    with pytest.raises(FactorError, match=r"layer model\.layers\..*meta device"):
        peft.PeftModel.from_pretrained(empty, tmp_path, low_cpu_mem_usage=True)


@pytest.mark.parametrize("kind", ["hiplora_A", "hiplora_delta", "hiplora_U"])
@pytest.mark.parametrize("damage", ["missing", "nan", "shape"])
def test_a_damaged_adapter_file_is_refused_by_name(tiny, tmp_path, kind, damage):
    tiny.adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(k for k in sorted(tensors) if k.removesuffix(".weight").endswith(kind))
    if damage == "missing":
        del tensors[key]
    elif damage == "nan":
        tensors[key].view(-1)[0] = float("nan")
    else:
        tensors[key] = tensors[key][:-1].contiguous()
    save_file(tensors, path)
    name = key.removeprefix("base_model.model.").partition(f".{kind}")[0]
    with pytest.raises(AdapterError, match=f"{name}.*{kind}".replace(".self", r"\.self")):
        peft.PeftModel.from_pretrained(tiny.make(), tmp_path)


def test_peft_converts_the_adapter_to_lora_exactly_at_rank_r_plus_k(tiny, ids, tmp_path):
    model = tiny.trained(ids)
    expected = logits(model, ids)
    peft.save_as_lora(tmp_path, model, rank=4 + 8)
    plain = peft.PeftModel.from_pretrained(tiny.make(), tmp_path)
    assert isinstance(plain.peft_config["default"], peft.LoraConfig)
    assert (logits(plain, ids) - expected).norm() <= 1e-5 * expected.norm()


def test_loading_into_an_adapter_leaves_those_that_share_its_factors_alone(tiny, ids, tmp_path):
    model = tiny.adapted()
    model.add_adapter("second", tiny.config())
    train(model, ids)
    expected = logits(model, ids)
    flipped = {k: -v if k.endswith(("_U", "_V")) else v for k, v in peft.get_peft_model_state_dict(model).items()}
    peft.set_peft_model_state_dict(model, flipped, adapter_name="second")
    for _, layer in hip_layers(model):
        assert torch.equal(layer.hiplora_U["default"], -layer.hiplora_U["second"])
    assert torch.equal(logits(model, ids), expected)
