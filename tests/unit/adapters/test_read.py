import dataclasses
import json
import re
import shutil

import peft
import pytest
import torch
from peft import LoraConfig, OSFConfig
from safetensors.torch import load_file, save_file

from hiplora.adapters import read_update, save_as_lora, save_dense, update_from_model
from hiplora.adapters.base import replace_extras
from hiplora.adapters.check import added
from hiplora.errors import AdapterError, ConfigError
from hiplora.spectral import FactorStore
from tests.tiny import left_as_it_was, save_tiny, tiny_mixture
from tests.unit.adapters.samples import (
    ATTENTION,
    PREFIX,
    Q0,
    adalora,
    assert_is,
    base_model,
    deltas,
    edit_config,
    edit_tensors,
    hip_config,
    logits,
    product,
    save_tiny_gpt2,
    saved,
    train,
)


@pytest.mark.parametrize(
    ("name", "kind", "ranks"),
    [
        ("one", "hiplora", {10}),
        ("proj", "hiplora", {4}),
        ("free", "hiplora", {10}),
        ("hip patterns", "hiplora", {13, 10, 7}),
        ("lora", "lora", {3}),
        ("mlp", "lora", {3}),
        ("patterns", "lora", {4, 2}),
        ("head", "lora", {4}),
        ("adalora", "adalora", None),
    ],
)
def test_an_adapter_is_read_from_its_folder_and_its_model_as_the_update_that_the_model_makes(
    adapters, name, kind, ranks
):
    folder, model = adapters[name], adapters.models[name]
    pattern = dict(getattr(model.peft_config["default"], "rank_pattern", None) or {})
    stored, live = read_update(folder), update_from_model(model)
    assert (model.peft_config["default"].rank_pattern or {}) == pattern
    assert (stored.kind, stored.extras) == (kind, {})
    assert set(stored.ranks.values()) == ranks if ranks else len(set(stored.ranks.values())) > 1
    assert_is(stored, deltas(model))
    assert live.fingerprints == stored.fingerprints
    for module, pair in stored.factors.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, live.factors[module], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_that_were_not_saved_come_from_the_base_model_in_its_precision(tiny_model_dir, tmp_path, dtype):
    folder, model = saved(tiny_model_dir, tmp_path / "a", hip_config(save_factors=False), dtype=dtype)
    assert_is(read_update(folder), deltas(model))
    assert_is(update_from_model(model), deltas(model))
    other = save_tiny(tmp_path / "other", seed=1)
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.k_proj.*not the one.*--base"):
        read_update(folder, base=str(other))
    edit_config(folder, basis="activation")
    with pytest.raises(AdapterError, match=r"the activation basis cannot be recomputed from weights"):
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


def test_pissa_is_read_as_the_difference_that_peft_saves_and_refused_without(adapters, tmp_path):
    update, model = read_update(adapters["pissa"]), adapters.models["pissa"]
    model.save_pretrained(tmp_path / "raw")
    with pytest.raises(AdapterError, match=r"'pissa'.*path_initial_model_for_weight_conversion"):
        read_update(tmp_path / "raw")
    original = base_model(adapters.base).state_dict()
    for module in update.factors:
        layer = model.get_submodule(PREFIX + module)
        merged = layer.base_layer.weight + layer.get_delta_weight("default")
        torch.testing.assert_close(
            product(update, module), merged - original[f"{module}.weight"], rtol=1e-5, atol=1e-6
        )


def test_an_adalora_adapter_without_its_pattern_is_refused_and_a_module_without_any_rank_is_zero(adapters, tmp_path):
    folder = shutil.copytree(adapters["adalora"], tmp_path / "a")
    edit_config(folder, rank_pattern=None)
    refused(folder, r"rank .*, but the configuration says 6")
    adalora(adapters.base, tinit=7, tfinal=0).save_pretrained(tmp_path / "b")

    def empty(tensors):
        for part, shape in (("A", (0, 64)), ("B", (64, 0)), ("E", (0, 1))):
            tensors[f"{PREFIX}{Q0}.lora_{part}"] = torch.zeros(shape)

    edit_tensors(tmp_path / "b", empty)
    edit_config(tmp_path / "b", rank_pattern={f"{Q0}.lora_E": [False] * 6})
    assert not product(read_update(tmp_path / "b"), Q0).any()


def test_an_osf_adapter_is_read_as_the_change_of_its_weights(tiny_model_dir, tmp_path):
    config = peft.OSFConfig(target_modules=["q_proj", "v_proj"], effective_rank=8)
    folder, model = saved(tiny_model_dir, tmp_path / "a", config)
    original = base_model(tiny_model_dir).state_dict()
    model.peft_config["default"].base_model_name_or_path = "nowhere"  # the live model has all it takes
    live, stored = update_from_model(model), read_update(folder)
    merged = model.merge_and_unload().state_dict()
    expected = {m: merged[f"{m}.weight"] - original[f"{m}.weight"] for m in stored.factors}
    assert min(delta.norm() for delta in expected.values()) > 1e-2
    assert stored.kind == "osf"
    for update in (live, stored):
        assert_is(update, expected, rtol=1e-3, atol=1e-4)


# PEFT matches these patterns with the parameter's name: those of the module's are without effect.
NAMES = ["gate", "router", "k_proj", "o_proj", "embed_tokens"]
OWN = {
    "rank_pattern": {**{f"{name}.weight": 3 for name in NAMES}, **dict.fromkeys(NAMES, 5), "down_proj": 3},
    "alpha_pattern": {**{f"{name}.weight": 24 for name in NAMES}, **dict.fromkeys(NAMES, 40)},
}


@pytest.mark.parametrize(
    ("kind", "modules", "parameters", "count"),
    [
        ("mixtral", ["q_proj"], ["down_proj"], 2 * (1 + 3)),  # weights that lie output first
        ("gpt_oss", ["q_proj"], ["experts.gate_up_proj", "experts.down_proj"], 2 * (1 + 6)),  # input first
        ("mixtral", "all-linear", None, 2 * (4 + 1 + 6)),  # which PEFT takes for the experts and the router too
        ("gpt_oss", [], ["router.weight", "down_proj", "k_proj.weight"], 2 * (1 + 3 + 1)),
        ("gpt_oss", [], ["embed_tokens.weight", "o_proj.weight"], 1 + 2),
    ],
)
def test_a_lora_of_experts_and_of_parameters_is_read_as_the_updates_of_each(
    tmp_path, kind, modules, parameters, count
):
    base = tmp_path / "base"
    tiny_mixture(kind).save_pretrained(base)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=modules, target_parameters=parameters, **OWN)
    folder, model = saved(base, tmp_path / "a", config)
    for source, update in ((folder, read_update(folder)), (model, update_from_model(model))):
        assert len(update.modules) == count
        assert {rank for name, rank in update.ranks.items() if "down_proj" in name} <= {3}
        bare = base_model(base)
        with added(bare, update):
            torch.testing.assert_close(logits(bare), logits(model), rtol=1e-4, atol=1e-5)
        assert torch.equal(logits(bare), logits(base_model(base)))
        assert (logits(bare) - logits(model)).abs().max() > 1e-3
        save_dense(source, tmp_path / "dense", overwrite=True)
        save_as_lora(source, tmp_path / "again", overwrite=True)
        again = peft.PeftModel.from_pretrained(base_model(base), str(tmp_path / "again"))
        for exported in (base_model(tmp_path / "dense"), again):
            torch.testing.assert_close(logits(exported), logits(model), rtol=1e-4, atol=1e-5)
    if parameters and "experts" in parameters[0]:
        edit_config(folder, target_parameters=["gate_up_proj"] * 2)
        refused(folder, r"experts(: its tensors are not those|.gate_up_proj: A .* are not factors)")


def test_experts_of_kinds_that_are_not_taken_apart_are_refused_with_the_way_out(tmp_path):
    tiny_mixture("llama4_text", pad_token_id=0).save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"])
    folder, _ = saved(tmp_path / "base", tmp_path / "a", config)
    with pytest.raises(AdapterError, match="merge it with PEFT"):
        save_dense(folder, tmp_path / "dense")
    # As transformers 4 named them.
    A, B = torch.randn(2, 32), torch.randn(48, 2)
    names = [f"{PREFIX}model.layers.1.mlp.experts.0.w1.lora_{part}.weight" for part in "AB"]
    save_file(dict(zip(names, (A, B), strict=True)), folder / "adapter_model.safetensors")
    edit_config(folder, target_modules=["w1"], target_parameters=None)
    with pytest.raises(AdapterError, match="which converts it, and save it again"):
        save_dense(folder, tmp_path / "dense")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LoraConfig(target_modules=ATTENTION, trainable_token_indices=[1, 2]), "token"),
        (LoraConfig(target_modules=["embed_tokens"]), "embed_tokens"),
        (LoraConfig(target_modules=ATTENTION, bias="all"), "bias"),
        (peft.LNTuningConfig(target_modules=["norm"]), "LN_TUNING adapts model.norm, which is no linear layer"),
        (peft.LilyConfig(target_modules=["q_proj"]), "PEFT cannot merge LILY into model.layers.0.self_attn.q_proj"),
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "changes what the model reads"),
    ],
)
def test_what_is_more_than_an_update_of_linear_layers_is_refused_and_named(tiny_model_dir, tmp_path, config, reason):
    peft.get_peft_model(base_model(tiny_model_dir), config).save_pretrained(tmp_path / "a")
    refused(tmp_path / "a", reason)


TWO = ["q_proj", "down_proj"]


@pytest.mark.filterwarnings("error:Already unmerged")
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=3, target_modules=TWO, use_dora=True, modules_to_save=["lm_head"]),
        LoraConfig(r=3, target_modules=["c_attn"], use_dora=True),
        peft.LoHaConfig(r=2, target_modules=TWO),
        peft.LoKrConfig(r=2, target_modules=TWO),
        peft.VeraConfig(r=8, target_modules=["q_proj"]),
        peft.OFTConfig(oft_block_size=4, target_modules=TWO),
        peft.BOFTConfig(boft_block_size=4, target_modules=TWO),
        peft.IA3Config(target_modules=TWO, feedforward_modules=["down_proj"]),
        peft.FourierFTConfig(n_frequency=20, target_modules=TWO),
        peft.HRAConfig(r=4, target_modules=TWO),
        peft.MissConfig(r=4, target_modules=TWO),
        peft.ShiraConfig(r=2, target_modules=TWO),
    ],
    ids=lambda config: f"{config.peft_type.value} {config.target_modules and min(config.target_modules)}",
)
def test_other_methods_are_read_as_what_their_merge_adds_and_export_as_lora(tiny_model_dir, tmp_path, config):
    base = tiny_model_dir
    if config.target_modules == {"c_attn"}:  # a layer with its weight as (in, out)
        base = save_tiny_gpt2(tmp_path / "gpt2")
    folder, model = saved(base, tmp_path / "a", config)
    expected, stored = logits(model), read_update(folder)
    with left_as_it_was(model):
        live = update_from_model(model)
    for update in (stored, live):
        bare = base_model(base)
        replace_extras(bare, update)
        with added(bare, update):
            torch.testing.assert_close(logits(bare), expected, atol=1e-5, rtol=1e-5)
    assert all(update.ranks[name] < min(update.shape(name)) for name in update.modules) == (
        config.peft_type in ("LOHA", "LOKR", "VERA", "HRA", "FOURIERFT", "MISS")
    )
    save_as_lora(folder, tmp_path / "b")
    exported = peft.PeftModel.from_pretrained(base_model(base), str(tmp_path / "b")).eval()
    torch.testing.assert_close(logits(exported), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["one", "lora", "hip whole", "osf"])
def test_a_state_dict_that_was_saved_without_peft_is_read(adapters, tmp_path, kind):
    if kind == "osf":
        model = peft.get_peft_model(base_model(adapters.base), OSFConfig(target_modules=["q_proj"], effective_rank=8))
        train(model).save_pretrained(tmp_path / "a")
    else:
        shutil.copytree(adapters[kind], tmp_path / "a")
        model = adapters.models[kind]
    expected, parts = read_update(tmp_path / "a"), r"lora_|osf_svd_params|modules_to_save|original_module"
    raw = {name: tensor.clone() for name, tensor in model.state_dict().items() if re.search(parts, name)}
    assert any(".default" in name for name in raw)
    save_file(raw, tmp_path / "a" / "adapter_model.safetensors")
    update = read_update(tmp_path / "a")
    assert update.extras.keys() == expected.extras.keys()
    for module in expected.modules:
        torch.testing.assert_close(update.delta(module), expected.delta(module))


def test_a_file_of_several_adapters_is_refused(folder):
    def double(tensors):
        for name in [name for name in tensors if "lora_A." in name]:
            tensors[name.replace(".weight", ".other.weight")] = tensors[name] + 1

    edit_tensors(folder, double)
    refused(folder, "holds several adapters; save one alone")


@pytest.mark.parametrize("kind", ["lora", "one"])
def test_a_compiled_model_is_read_as_the_model(adapters, kind):
    model = adapters.models[kind]
    assert_is(update_from_model(torch.compile(model)), deltas(model))


@pytest.mark.parametrize("kind", ["lora", "one"])
def test_settings_that_are_left_out_are_those_of_peft(adapters, tmp_path, kind):
    folder = shutil.copytree(adapters[kind], tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["lora_alpha"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert_is(read_update(folder), deltas(peft.PeftModel.from_pretrained(base_model(adapters.base), folder)))


def test_a_resized_vocabulary_is_read_whatever_its_embeddings_are_called(tmp_path):
    save_tiny_gpt2(tmp_path / "base")
    model = base_model(tmp_path / "base")
    model.resize_token_embeddings(len(model.get_input_embeddings().weight) + 4)
    adapted = train(peft.get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"])))
    adapted.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    update = read_update(tmp_path / "a")
    assert_is(update, deltas(adapted))
    assert "transformer.wte.weight" in update.extras


class Harmful:
    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("part", ["adapter_model", "pytorch_model"])
def test_pickled_weights_run_nothing(adapters, tmp_path, part):
    folder = shutil.copytree(adapters["lora"], tmp_path / "a")
    base = shutil.copytree(adapters.base, tmp_path / "base")
    harmful = Harmful()
    harmful.path = str(tmp_path / "ran")
    place = folder if part == "adapter_model" else base
    weights = next(place.glob("*model.safetensors"))
    tensors = load_file(weights)
    weights.unlink()
    torch.save(tensors, place / f"{part}.bin")
    save_dense(folder, tmp_path / "out", base=str(base))  # plain tensors are read
    torch.save({**tensors, "lora_A": harmful}, place / f"{part}.bin")
    with pytest.raises(AdapterError, match=r"damaged or cut off|cannot be read"):
        save_dense(folder, tmp_path / "again", base=str(base))
    assert not (tmp_path / "ran").exists()


@pytest.fixture(params=["one", "lora"])
def folder(request, adapters, tmp_path):
    return shutil.copytree(adapters[request.param], tmp_path / "copy")


def refused(folder, why):
    with pytest.raises(AdapterError, match=why):
        read_update(folder)


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_every_tensor_that_is_missing_or_of_the_wrong_shape_is_named(folder, damage):
    whole = (folder / "adapter_model.safetensors").read_bytes()
    names = []
    edit_tensors(folder, lambda tensors: names.extend(name for name in tensors if Q0 in name))
    for name in names:

        def spoil(tensors, name=name):
            tensor = tensors.pop(name)
            if damage == "cut":
                tensors[name] = tensor[..., :-1] if "_A" not in name else tensor[:-1]

        edit_tensors(folder, spoil)
        plain = name.removeprefix(PREFIX).removesuffix(".weight")
        refused(folder, rf"tensor {plain}\S* is missing" if damage == "missing" else Q0)
        (folder / "adapter_model.safetensors").write_bytes(whole)


def test_nan_and_complex_factors_are_named_with_file_and_tensor(folder):
    def spoil(tensors):
        next(tensors[name] for name in sorted(tensors) if Q0 in name).view(-1)[0] = float("nan")

    def turn(tensors):
        tensors.update({name: tensor.to(torch.complex64) for name, tensor in tensors.items() if "_A" in name})

    edit_tensors(folder, spoil)
    refused(folder, rf"adapter_model\.safetensors: tensor {Q0}.*: 1 of \d+ values")
    edit_tensors(folder, turn)
    refused(folder, "_A.* is complex")


def test_a_cut_off_file_and_a_broken_configuration_are_named_and_a_folder_without_an_adapter_is_wrong_usage(
    folder, tmp_path
):
    edit_config(folder, r=5)
    refused(folder, r"rank \d, but the configuration says 5")
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(folder, r"adapter_model\.safetensors: damaged or cut off")
    file.unlink()
    refused(folder, r"has adapter_config\.json but no adapter_model\.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": ')
    refused(folder, r"adapter_config\.json: not valid JSON")
    with pytest.raises(ConfigError, match=r"no adapter_config\.json"):
        read_update(tmp_path)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"lora_alpha": "8"}, "lora_alpha is '8'; expected a valid number"),
        ({"r": 0}, "r is 0; expected greater than 0"),
        ({"peft_type": []}, "peft_type is .*expected a valid string"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is .*; expected a valid dict"),
        ({"use_rslora": "no"}, "use_rslora is 'no'; expected a valid boolean"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan; expected a finite number"),
        ({"alpha_pattern": {"up_proj": "x"}}, "alpha_pattern is 'x'; expected a valid number"),
        ({"target_modules": ["q_proj", 3]}, "target_modules is 3; expected a valid string"),
        ({"modules_to_save": [3]}, "modules_to_save is 3; expected a valid string"),
        ({"layers_to_transform": "x"}, "layers_to_transform is 'x'; expected a valid list"),
        ({"task_type": "NOPE"}, "PEFT does not accept it .*'NOPE'"),
        ({"rank_pattern": {"[": 4}}, "no regular expression"),
        ({"rank_pattern": {"([a-z._0-9]+)+X": 4}}, "takes over 1 s"),
        ({"target_modules": "([a-z._0-9]+)+X"}, "takes over 1 s"),
    ],
)
def test_a_strangers_settings_are_refused_by_name_and_no_pattern_hangs(folder, monkeypatch, changes, why):
    monkeypatch.setattr("hiplora.tuner.patterns.MATCH_SECONDS", 1)
    edit_config(folder, **changes)
    refused(folder, why)


def test_settings_that_peft_does_not_know_are_named(folder):
    edit_config(folder, use_future_thing=True, another=None)
    with pytest.warns(UserWarning, match="use_future_thing is not known to PEFT"):
        read_update(folder)


def test_a_module_that_the_configuration_lists_and_the_file_lacks_is_named(adapters, tmp_path):
    folder = shutil.copytree(adapters["one"], tmp_path / "a")
    edit_tensors(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if Q0 in name])
    refused(folder, f"{Q0}.hiplora_A is missing")
    edit_tensors(folder, lambda tensors: tensors.clear())
    refused(folder, "nothing was adapted or saved")


def test_a_live_model_that_diverged_or_lacks_the_adapter_is_refused(tiny_model_dir):
    model = peft.get_peft_model(base_model(tiny_model_dir), hip_config())
    with pytest.raises(AdapterError, match=r"'other'.*'default'"):
        update_from_model(model, "other")
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "hiplora_B" in n).fill_(float("nan"))
    with pytest.raises(AdapterError, match="NaN"):
        update_from_model(model)
