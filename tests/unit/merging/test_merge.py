import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from hiplora.adapters import inspect_adapter, read_update, save_dense
from hiplora.errors import AdapterError, ConfigError
from hiplora.merging import RULES, DenseMerge, merge, save_merged
from tests.tiny import save_tiny
from tests.unit.adapters.samples import (
    base_model,
    deltas,
    edit_tensors,
    hip_config,
    leaky,
    logits,
    product,
    saved,
)


def products(update):
    return {module: product(update, module) for module in update.factors}


def assert_is_sum(update, terms):
    """The merged update is Σ w · ΔW, from the adapters read apart."""
    expected = {}
    for weight, folder in terms:
        for module, delta in products(read_update(folder)).items():
            expected[module] = expected.get(module, 0) + weight * delta
    assert set(update.factors) == set(expected)
    for module, delta in expected.items():
        torch.testing.assert_close(product(update, module), delta, rtol=1e-4, atol=1e-6)


def delta(update, module):
    return update.delta(module) if isinstance(update, DenseMerge) else product(update, module)


def rename_base(folder, to, name):
    copy = shutil.copytree(folder, to)
    file = copy / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": name}))
    return copy


FACTOR_RULES = [name for name, rule in RULES.items() if rule.kind == "factors"]
ALL = ("one", "two", "three", "other rank", "proj", "lora", "mlp", "patterns", "adalora", "pissa")


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (("one", "two"), None),
        (("one", "two", "three"), (0.5, -1.0, 2.0)),
        (("one", "lora"), (1.0, 0.3)),
        (("one", "other rank"), None),
        (("proj", "two"), None),
        (ALL, None),
        (ALL, (1, -1, 0.5, 0, 2, -0.25, 1, 0.5, -2, 0.1)),
        (("one", "adalora", "pissa"), None),
    ],
)
def test_a_merge_is_the_weighted_sum_of_the_updates(adapters, names, weights):
    folders = [adapters[name] for name in names]
    update = merge(folders, weights=weights)
    assert update.kind == "merged"
    assert_is_sum(update, list(zip(weights or [1] * len(names), folders, strict=True)))


def test_hiplora_adapters_that_share_a_basis_merge_at_twice_r_plus_k(adapters):
    update = merge([adapters["one"], adapters["two"]])
    assert set(update.ranks.values()) == {4 + 4 + 6}
    assert set(update.channels) == set(update.factors)


@pytest.mark.parametrize("name", ["one", "proj", "lora"])
def test_merging_one_adapter_is_that_adapter_bit_for_bit(adapters, name):
    update, alone = merge([adapters[name]]), read_update(adapters[name])
    for module in alone.factors:
        assert all(
            torch.equal(a, b) for a, b in zip(update.factors[module], alone.factors[module], strict=True)
        )


def test_weights_one_and_zero_give_the_first_adapter_bit_for_bit(adapters):
    update = merge([adapters["one"], adapters["two"], adapters["lora"]], weights=(1, 0, 0))
    alone = read_update(adapters["one"])
    for module in alone.factors:
        assert all(
            torch.equal(a, b) for a, b in zip(update.factors[module], alone.factors[module], strict=True)
        )


def test_a_merge_saved_and_loaded_by_stock_peft_is_the_merge_in_memory(adapters, tiny_model_dir, tmp_path):
    update = merge([adapters[name] for name in ALL])
    report = save_merged(update, tmp_path / "out")
    stored = read_update(tmp_path / "out")
    for module in update.factors:
        assert all(
            torch.equal(a, b) for a, b in zip(update.factors[module], stored.factors[module], strict=True)
        )
    assert report.worst[1] < 1e-6
    assert report.logits is not None
    assert report.logits < 1e-5
    model = PeftModel.from_pretrained(base_model(tiny_model_dir), tmp_path / "out").eval()
    assert set(deltas(model)) == set(update.factors)
    for module, delta in deltas(model).items():
        torch.testing.assert_close(delta, product(update, module), rtol=1e-5, atol=1e-6)
    assert (logits(model) - logits(base_model(tiny_model_dir))).abs().max() > 1e-3


def test_a_merge_is_padded_made_dense_and_inspected_like_any_adapter(adapters, tiny_model_dir, tmp_path):
    update = merge([adapters["one"], adapters["two"]])
    save_merged(update, tmp_path / "padded", pad_rank=16)
    assert set(read_update(tmp_path / "padded").ranks.values()) == {16}
    save_dense(update, tmp_path / "dense")
    model = PeftModel.from_pretrained(base_model(tiny_model_dir), tmp_path / "padded").eval()
    torch.testing.assert_close(logits(base_model(tmp_path / "dense")), logits(model), rtol=1e-4, atol=1e-5)
    record = inspect_adapter(update)
    assert (record["method"], record["principal_rank"]) == ("merged", 6)
    assert record["summary"]["max_leak"] < 1e-4


def test_a_merge_can_be_merged_again(adapters):
    twice = merge([merge([adapters["one"], adapters["two"]]), adapters["three"]])
    assert_is_sum(twice, [(1, adapters["one"]), (1, adapters["two"]), (1, adapters["three"])])
    assert twice.rank("model.layers.0.self_attn.q_proj") == 4 + 4 + 2 + 6


@pytest.mark.parametrize("method", FACTOR_RULES)
def test_every_rule_of_factors_is_saved_and_loaded_as_it_is_in_memory(adapters, tmp_path, method):
    update = merge([adapters[name] for name in ("one", "lora", "adalora")], method, (1, 0.5, -1))
    report = save_merged(update, tmp_path / "out", check_logits=False)
    stored = read_update(tmp_path / "out")
    assert set(stored.factors) == set(update.factors)
    for module, factors in update.factors.items():
        assert all(torch.equal(a, b) for a, b in zip(factors, stored.factors[module], strict=True))
    assert report.worst[1] < 1e-5


@pytest.mark.parametrize("method", RULES)
def test_every_rule_merges_all_kinds_of_adapters_module_by_module(adapters, method):
    folders = [adapters[name] for name in ALL]
    update = merge(folders, method)
    modules = set(update.modules if isinstance(update, DenseMerge) else update.factors)
    assert modules == {module for folder in folders for module in read_update(folder).factors}
    down = "model.layers.0.mlp.down_proj"  # adapted by two of them
    alone = merge([adapters["patterns"], adapters["adalora"]], method)
    torch.testing.assert_close(delta(update, down), delta(alone, down))


def test_what_an_adapter_of_weight_zero_alone_adapts_is_left_out(adapters):
    update = merge([adapters["one"], adapters["mlp"]], weights=(1, 0))
    assert set(update.factors) == set(read_update(adapters["one"]).factors)


def test_an_option_is_the_rules(adapters):
    folders = [adapters["one"], adapters["lora"]]
    flat, half = merge(folders, "iso-c"), merge(folders, "iso-c", options={"scale": 0.5})
    for module in flat.factors:
        torch.testing.assert_close(delta(half, module), 0.5 * delta(flat, module), rtol=1e-4, atol=1e-7)
    with pytest.raises(ConfigError, match="'iso-c' has no option 'density'; its options: scale"):
        merge(folders, "iso-c", options={"density": 0.5})


def test_a_bar_can_follow(adapters):
    seen = []
    merge([adapters["one"]], "tsv", wrap=lambda names: (seen.append(name) or name for name in names))
    assert seen == sorted(read_update(adapters["one"]).factors)


# What cannot be merged


@pytest.mark.parametrize("method", RULES)
def test_no_rule_merges_adapters_of_different_base_weights(adapters, tmp_path, method):
    other = save_tiny(tmp_path / "other", seed=1)
    foreign, _ = saved(other, tmp_path / "foreign", hip_config())
    with pytest.raises(AdapterError, match="different base weights"):
        merge([adapters["one"], foreign], method)
    with pytest.raises(AdapterError, match="not the one that this adapter was made for"):
        merge([adapters["one"], adapters["lora"]], method, base=str(other))


def test_a_module_that_the_base_model_lacks_is_named(adapters, tiny_model_dir, tmp_path):
    def move(tensors):
        for name in [name for name in tensors if ".layers.1." in name]:
            tensors[name.replace(".layers.1.", ".layers.7.")] = tensors.pop(name)

    folder = shutil.copytree(adapters["lora"], tmp_path / "deeper")
    edit_tensors(folder, move)
    with pytest.raises(AdapterError, match=r"has no linear layer model\.layers\.7\.self_attn"):
        merge([adapters["one"], folder], base=str(tiny_model_dir))


@pytest.mark.parametrize("method", RULES)
def test_a_factor_that_is_not_finite_is_refused_and_named(adapters, tmp_path, method):
    folder = shutil.copytree(adapters["lora"], tmp_path / "broken")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    edit_tensors(folder, lambda tensors: tensors[name].view(-1)[:2].fill_(float("nan")))
    with pytest.raises(AdapterError, match=r"q_proj\.lora_B\.weight: 2 of \d+ values are NaN or Inf"):
        merge([adapters["one"], folder], method)


def test_adapters_of_different_base_weights_are_refused_and_the_layer_is_named(adapters, tmp_path):
    other = save_tiny(tmp_path / "other", seed=1)
    foreign, _ = saved(other, tmp_path / "foreign", hip_config())
    with pytest.raises(
        AdapterError, match=r"layer model\.layers\.0\.self_attn\.k_proj: .* different base weights"
    ):
        merge([adapters["one"], foreign])


def test_the_layer_is_named_even_if_only_later_adapters_disagree(adapters, tmp_path):
    other = save_tiny(tmp_path / "other", seed=1)
    foreign, _ = saved(other, tmp_path / "foreign", hip_config(target_modules=["up_proj"]))
    here, _ = saved(
        read_update(adapters["one"]).base, tmp_path / "here", hip_config(target_modules=["up_proj"])
    )
    with pytest.raises(
        AdapterError, match=r"layer model\.layers\.0\.mlp\.up_proj: .* different base weights"
    ):
        merge([adapters["one"], here, foreign])


def test_lora_adapters_of_differently_named_bases_are_refused_with_the_way_out(adapters, tmp_path):
    renamed = rename_base(adapters["lora"], tmp_path / "renamed", "somebody/else")
    with pytest.raises(
        AdapterError, match=r"somebody/else; if these are the same model, name it: pass base=…"
    ):
        merge([adapters["mlp"], renamed])


def test_naming_the_base_settles_differently_spelled_names(adapters, tiny_model_dir, tmp_path):
    renamed = rename_base(adapters["lora"], tmp_path / "renamed", "somebody/else")
    update = merge([adapters["one"], renamed], base=str(tiny_model_dir))
    assert update.base == str(tiny_model_dir)
    assert_is_sum(update, [(1, adapters["one"]), (1, adapters["lora"])])


def test_naming_a_base_that_the_adapters_were_not_made_for_is_refused(adapters, tmp_path):
    other = save_tiny(tmp_path / "other", seed=1)
    with pytest.raises(AdapterError, match="not the one that this adapter was made for"):
        merge([adapters["one"], adapters["lora"]], base=str(other))


def test_the_same_weights_under_another_name_are_the_same_base(adapters, tmp_path):
    moved = rename_base(adapters["two"], tmp_path / "moved", "a/copy")
    assert_is_sum(merge([adapters["one"], moved]), [(1, adapters["one"]), (1, adapters["two"])])


def test_adapters_of_different_shapes_are_refused_whatever_their_base_is_called(adapters, tmp_path):
    settings = LlamaConfig.from_pretrained(read_update(adapters["lora"]).base)
    settings.num_key_value_heads = 4
    LlamaForCausalLM(settings).save_pretrained(tmp_path / "wide")
    foreign, _ = saved(tmp_path / "wide", tmp_path / "foreign", LoraConfig(target_modules=["k_proj"]))
    renamed = rename_base(foreign, tmp_path / "renamed", read_update(adapters["lora"]).base)
    with pytest.raises(
        AdapterError, match=r"layer model\.layers\.0\.self_attn\.k_proj: .* different base weights"
    ):
        merge([adapters["lora"], renamed])


def test_modules_saved_whole_cannot_be_added(adapters, tiny_model_dir, tmp_path):
    whole, _ = saved(tiny_model_dir, tmp_path / "a", hip_config(modules_to_save=["lm_head"]))
    with pytest.raises(AdapterError, match=r"replaces whole modules \(lm_head\.weight\)"):
        merge([adapters["one"], whole])
    assert set(merge([whole]).extras) == {"lm_head.weight"}


def test_a_leaky_adapter_is_refused(adapters, tiny_model_dir, tmp_path):
    folder, module = leaky(tiny_model_dir, tmp_path / "a")
    with pytest.raises(AdapterError, match=f"{module} leaks"):
        merge([adapters["one"], folder])


@pytest.mark.parametrize("weights", [(1,), (1, 2, 3), ()])
def test_a_weight_list_of_the_wrong_length_is_refused(adapters, weights):
    with pytest.raises(ConfigError, match=rf"{len(weights)} given for 2 adapters"):
        merge([adapters["one"], adapters["two"]], weights=weights)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "1", True, None])
def test_a_weight_that_is_no_finite_number_is_refused(adapters, bad):
    with pytest.raises(ConfigError, match="not a finite number"):
        merge([adapters["one"], adapters["two"]], weights=(1, bad))


def test_nothing_to_merge_is_said():
    with pytest.raises(ConfigError, match="at least one adapter"):
        merge([])
