import dataclasses

import peft
import pytest
import torch
from peft import LoraConfig

from hiplora.adapters import read, read_update, update_from_model
from hiplora.errors import AdapterError, ConfigError
from hiplora.spectral import FactorStore
from tests.tiny import save_tiny
from tests.unit.adapters.samples import (
    ATTENTION,
    adalora,
    base_model,
    deltas,
    edit_config,
    edit_tensors,
    hip_config,
    product,
    saved,
    train,
    trained,
)

Q0 = "model.layers.0.self_attn.q_proj"
PREFIX = "base_model.model."


def assert_update_is(update, expected):
    assert set(update.factors) == set(expected)
    for module, delta in expected.items():
        torch.testing.assert_close(product(update, module), delta, rtol=1e-5, atol=1e-6)
    assert max(delta.norm() for delta in expected.values()) > 0


@pytest.mark.parametrize(
    ("changes", "kind", "ranks"),
    [
        ({}, "hiplora", {10}),
        ({"principal_channel": False}, "hiplora", {4}),
        ({"residual_projection": False}, "hiplora", {10}),
        (
            {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"k_proj": 2}, "principal_rank_pattern": {"o_proj": 3}},
            "hiplora",
            {13, 10, 7},
        ),
    ],
)
def test_a_hiplora_adapter_is_read_as_the_update_that_its_model_makes(tiny_model_dir, tmp_path, changes, kind, ranks):
    folder, model = saved(tiny_model_dir, tmp_path / "a", hip_config(**changes))
    stored, live = read_update(folder), update_from_model(model)
    assert (stored.kind, set(stored.ranks.values())) == (kind, ranks)
    assert_update_is(stored, deltas(model))
    assert live.fingerprints == stored.fingerprints
    for module, pair in stored.factors.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, live.factors[module], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_that_were_not_saved_come_from_the_base_model_in_its_precision(tiny_model_dir, tmp_path, dtype):
    folder, model = saved(tiny_model_dir, tmp_path / "a", hip_config(save_factors=False), dtype=dtype)
    assert_update_is(read_update(folder), deltas(model))
    other = save_tiny(tmp_path / "other", seed=1)
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.k_proj.*not the one.*--base"):
        read_update(folder, base=str(other))
    edit_config(folder, basis="activation")
    with pytest.raises(AdapterError, match=r"the activation basis cannot be computed again"):
        read_update(folder)


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


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": 3},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 5}},
        {"target_modules": ["q_proj", "lm_head"]},  # PEFT saves a copy of the head's frozen weight
    ],
)
def test_a_lora_adapter_is_read_as_the_update_that_peft_makes(tiny_model_dir, tmp_path, changes):
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ATTENTION} | changes)
    folder, model = saved(tiny_model_dir, tmp_path / "a", config)
    assert (read_update(folder).kind, read_update(folder).extras) == ("lora", {})
    assert_update_is(read_update(folder), deltas(model))
    assert_update_is(update_from_model(model), deltas(model))


def test_pissa_is_read_as_the_difference_that_peft_saves_and_refused_without(tiny_model_dir, tmp_path):
    config = LoraConfig(r=4, lora_alpha=4, target_modules=ATTENTION, init_lora_weights="pissa")
    model = peft.get_peft_model(base_model(tiny_model_dir), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    train(model)
    model.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=tmp_path / "start")
    model.save_pretrained(tmp_path / "raw")
    with pytest.raises(AdapterError, match=r"'pissa'.*path_initial_model_for_weight_conversion"):
        read_update(tmp_path / "raw")
    update = read_update(tmp_path / "a")
    merged, original = model.merge_and_unload().state_dict(), base_model(tiny_model_dir).state_dict()
    assert_update_is(update, {m: merged[f"{m}.weight"] - original[f"{m}.weight"] for m in update.factors})


def test_an_adalora_adapter_is_read_without_the_ranks_that_were_pruned(tiny_model_dir, tmp_path):
    model = adalora(tiny_model_dir)
    before = {name: list(kept) for name, kept in model.peft_config["default"].rank_pattern.items()}
    assert_update_is(update_from_model(model), deltas(model))
    assert model.peft_config["default"].rank_pattern == before
    model.save_pretrained(tmp_path / "a")
    update = read_update(tmp_path / "a")
    assert (update.kind, len(set(update.ranks.values())) > 1) == ("adalora", True)
    assert_update_is(update, deltas(model))
    edit_config(tmp_path / "a", rank_pattern=None)
    with pytest.raises(AdapterError, match=r"rank .*, but the configuration says 6"):
        read_update(tmp_path / "a")


def test_an_adalora_module_without_any_rank_left_has_a_zero_update(tiny_model_dir, tmp_path):
    adalora(tiny_model_dir, tinit=7, tfinal=0).save_pretrained(tmp_path / "a")

    def empty(tensors):
        for part, shape in (("A", (0, 64)), ("B", (64, 0)), ("E", (0, 1))):
            tensors[f"{PREFIX}{Q0}.lora_{part}"] = torch.zeros(shape)

    edit_tensors(tmp_path / "a", empty)
    edit_config(tmp_path / "a", rank_pattern={f"{Q0}.lora_E": [False] * 6})
    assert not product(read_update(tmp_path / "a"), Q0).any()


def test_an_osf_adapter_is_read_as_the_change_of_its_weights(tiny_model_dir, tmp_path):
    config = peft.OSFConfig(target_modules=["q_proj", "v_proj"], effective_rank=8)
    folder, model = saved(tiny_model_dir, tmp_path / "a", config)
    original = base_model(tiny_model_dir).state_dict()
    live, stored = update_from_model(model), read_update(folder)
    merged = model.merge_and_unload().state_dict()
    expected = {m: merged[f"{m}.weight"] - original[f"{m}.weight"] for m in stored.factors}
    assert stored.kind == "osf"
    for update in (live, stored):
        for module, delta in expected.items():
            torch.testing.assert_close(product(update, module), delta, rtol=1e-3, atol=1e-4)
            assert delta.norm() > 1e-2


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LoraConfig(target_modules=ATTENTION, use_dora=True), "use_dora"),
        (LoraConfig(target_modules=ATTENTION, trainable_token_indices=[1, 2]), "token"),
        (LoraConfig(target_modules=["embed_tokens"]), "embed_tokens"),
        (LoraConfig(target_modules=ATTENTION, bias="all"), "bias"),
        (LoraConfig(target_modules=[], target_parameters=[f"{Q0}.weight"]), "parameters"),
        (peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "IA3"),
    ],
)
def test_what_is_not_a_plain_update_is_refused_and_named(tiny_model_dir, tmp_path, config, reason):
    peft.get_peft_model(base_model(tiny_model_dir), config).save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterError, match=reason):
        read_update(tmp_path / "a")


@pytest.mark.parametrize(
    ("kind", "renamed"),
    [
        ("lora", lambda name: name.replace(".model.layers", "._orig_mod.model.layers")),
        ("lora", lambda name: "module." + name.replace(".self_attn.", "._fsdp_wrapped_module.self_attn.")),
        ("lora", lambda name: name.replace(".weight", ".default.weight").removeprefix(PREFIX)),
        ("hiplora", lambda name: name.replace(".layers.", ".layers._checkpoint_wrapped_module.")),
    ],
)
def test_names_that_wrappers_of_the_model_left_are_read_as_the_modules_own(tiny_model_dir, tmp_path, kind, renamed):
    config = hip_config() if kind == "hiplora" else LoraConfig(r=4, target_modules=ATTENTION)
    folder, _ = saved(tiny_model_dir, tmp_path / "a", config)
    expected = read_update(folder)

    def rename(tensors):
        for name in list(tensors):
            tensors[renamed(name)] = tensors.pop(name)

    edit_tensors(folder, rename)
    assert_update_is(read_update(folder), {module: product(expected, module) for module in expected.factors})


# Damage


@pytest.fixture(params=["hiplora", "lora"])
def folder(request, tiny_model_dir, tmp_path):
    config = hip_config() if request.param == "hiplora" else LoraConfig(r=4, target_modules=ATTENTION)
    return saved(tiny_model_dir, tmp_path / request.param, config)[0]


def refused(folder, why):
    with pytest.raises(AdapterError, match=why):
        read_update(folder)


def names_of(folder, tensors):
    return sorted(name.removeprefix(PREFIX) for name in tensors if Q0 in name)


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_every_tensor_that_is_missing_or_of_the_wrong_shape_is_named(folder, damage):
    whole = (folder / "adapter_model.safetensors").read_bytes()
    names = []
    edit_tensors(folder, lambda tensors: names.extend(names_of(folder, tensors)))
    for name in names:

        def spoil(tensors, name=PREFIX + name):
            tensor = tensors.pop(name)
            if damage == "cut":
                tensors[name] = tensor[..., :-1] if "_A" not in name else tensor[:-1]

        edit_tensors(folder, spoil)
        refused(folder, rf"tensor {name.removesuffix('.weight')}\S* is missing" if damage == "missing" else Q0)
        (folder / "adapter_model.safetensors").write_bytes(whole)


def test_nan_is_named_with_file_and_tensor(folder):
    def spoil(tensors):
        next(tensors[name] for name in sorted(tensors) if Q0 in name).view(-1)[0] = float("nan")

    edit_tensors(folder, spoil)
    refused(folder, rf"adapter_model\.safetensors: tensor {Q0}.*: 1 of \d+ values")


def test_a_cut_off_file_and_a_broken_configuration_are_named_and_a_folder_without_an_adapter_is_wrong_usage(
    folder, tmp_path
):
    edit_config(folder, r=5)
    refused(folder, "rank 4, but the configuration says 5")
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(folder, r"adapter_model\.safetensors: damaged or cut off")
    (folder / "adapter_config.json").write_text('{"peft_type": ')
    refused(folder, r"adapter_config\.json: not valid JSON")
    with pytest.raises(ConfigError, match=r"no adapter_config\.json"):
        read_update(tmp_path)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"lora_alpha": "8"}, "lora_alpha is '8'; expected a valid number"),
        ({"r": True}, "r is True; expected a valid integer"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is .*; expected a valid dict"),
        ({"use_rslora": "no"}, "use_rslora is 'no'; expected a valid boolean"),
        ({"lora_alpha": None}, "lora_alpha is None; expected a valid number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan; expected a finite number"),
        ({"alpha_pattern": {"up_proj": "x"}}, "alpha_pattern is 'x'; expected a valid number"),
        ({"target_modules": ["q_proj", 3]}, "target_modules is 3; expected a valid string"),
        ({"modules_to_save": [3]}, "modules_to_save is 3; expected a valid string"),
        ({"layers_to_transform": "x"}, "layers_to_transform is 'x'; expected a valid list"),
        ({"task_type": "NOPE"}, "PEFT does not accept it .*'NOPE'"),
        ({"rank_pattern": {"[": 4}}, "no regular expression"),
        ({"rank_pattern": {"([a-z._0-9]+)+X": 4}}, "takes over 1 s"),
        ({"target_modules": "([a-z._0-9]+)+X"}, "takes over 1 s"),
        ({"modules_to_save": ["([a-z._0-9]+)+X"]}, "takes over 1 s"),
    ],
)
def test_a_strangers_settings_are_refused_by_name_and_no_pattern_hangs(folder, monkeypatch, changes, why):
    monkeypatch.setattr(read, "_MATCH_SECONDS", 1)
    edit_config(folder, **changes)
    refused(folder, why)


def test_settings_that_peft_does_not_know_are_named_and_complex_factors_refused(folder):
    edit_config(folder, use_future_thing=True, another=None)
    with pytest.warns(UserWarning, match="use_future_thing is not known to PEFT"):
        read_update(folder)
    edit_config(folder, use_future_thing=False)

    def spoil(tensors):
        name = next(name for name in tensors if "_A" in name)
        tensors[name] = tensors[name].to(torch.complex64)

    edit_tensors(folder, spoil)
    refused(folder, "_A.* is complex")


def test_a_module_that_the_configuration_lists_and_the_file_lacks_is_named(tiny_model_dir, tmp_path):
    folder, _ = saved(tiny_model_dir, tmp_path / "a", hip_config())
    edit_tensors(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if Q0 in name])
    refused(folder, f"{Q0}.hiplora_A is missing")
    edit_tensors(folder, lambda tensors: tensors.clear())
    edit_config(folder, fingerprints={})
    refused(folder, "nothing was adapted or saved")


def test_a_live_model_that_diverged_or_lacks_the_adapter_is_refused(tiny_model_dir):
    model = trained(tiny_model_dir, hip_config())
    with pytest.raises(AdapterError, match=r"'other'.*'default'"):
        update_from_model(model, "other")
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "hiplora_B" in n).fill_(float("nan"))
    with pytest.raises(AdapterError, match="NaN"):
        update_from_model(model)
