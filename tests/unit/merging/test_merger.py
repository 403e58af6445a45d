"""Merging whole adapters: sums, truncation, dense merges, and what is refused."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from peft.utils import merge_utils

from hiplora.adapters import read_update, save_as_lora
from hiplora.errors import AdapterError, ConfigError
from hiplora.merging import RULES, DenseMerge, merge
from tests import reference
from tests.tiny import save_tiny
from tests.unit.adapters.samples import base_model, deltas, edit_config, hip_config, leaky, product, saved
from tests.unit.merging.terms import lora_term

ALL = ("one", "two", "three", "other rank", "proj", "lora", "mlp", "patterns", "adalora", "pissa")
Q0, UP0 = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"


def assert_is_sum(update, terms):
    """The merged update is Σ w · ΔW, from the adapters read apart."""
    expected = {}
    for weight, folder in terms:
        alone = read_update(folder)
        for module in alone.factors:
            expected[module] = expected.get(module, 0) + weight * product(alone, module)
    assert set(update.factors) == set(expected)
    for module, delta in expected.items():
        torch.testing.assert_close(product(update, module), delta, rtol=1e-4, atol=1e-6)


def delta(update, module):
    return update.delta(module) if isinstance(update, DenseMerge) else product(update, module)


def same_factors(one, other):
    return all(torch.equal(a, b) for m in other.factors for a, b in zip(one.factors[m], other.factors[m], strict=True))


def rename_base(folder, to, name):
    copy = shutil.copytree(folder, to)
    file = copy / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": name}))
    return copy


def test_a_merge_of_all_kinds_of_adapters_is_the_weighted_sum_of_their_updates(adapters):
    weights = (1, -1, 0.5, 0, 2, -0.25, 1, 0.5, -2, 0.1)
    folders = [adapters[name] for name in ALL]
    assert_is_sum(merge(folders, weights=weights), list(zip(weights, folders, strict=True)))


def test_a_merge_saved_and_loaded_by_stock_peft_is_the_merge_in_memory(adapters, tiny_model_dir, tmp_path):
    update = merge([adapters[name] for name in ALL])
    save_as_lora(update, tmp_path / "out")
    assert same_factors(read_update(tmp_path / "out"), update)
    model = PeftModel.from_pretrained(base_model(tiny_model_dir), tmp_path / "out").eval()
    assert set(deltas(model)) == set(update.factors)
    for module, found in deltas(model).items():
        torch.testing.assert_close(found, product(update, module), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", RULES)
def test_every_rule_merges_all_kinds_of_adapters_module_by_module(adapters, method):
    folders = [adapters[name] for name in ALL]
    update = merge(folders, method)
    assert set(update.modules) == {module for folder in folders for module in read_update(folder).factors}
    down = "model.layers.0.mlp.down_proj"  # adapted by two of them
    alone = merge([adapters["patterns"], adapters["adalora"]], method)
    torch.testing.assert_close(delta(update, down), delta(alone, down))


def test_weights_and_options_reach_the_rule(adapters):
    folders = [adapters[name] for name in ("one", "lora", "mlp")]
    parts = [product(read_update(folder), Q0) for folder in folders[:2]]
    expected = merge_utils.ties(parts, torch.tensor([1.0, 0.5]), 0.4)
    found = merge(folders, "ties", (1, 0.5, -1), options={"density": 0.4}).delta(Q0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_each_module_draws_by_itself():
    rule, term = RULES["dare"], lora_term(1)
    terms = {"a": [term], "b": [term]}
    update = DenseMerge("", "merged", {}, {}, terms=terms, rule=rule, options=rule.options())
    assert not torch.equal(update.delta("a"), update.delta("b"))


def test_a_dense_merge_is_not_a_lora_adapter_and_not_merged_again(adapters, tmp_path):
    dense = merge([adapters["one"], adapters["lora"]], "ties")
    for use in (lambda: save_as_lora(dense, tmp_path / "out"), lambda: merge([dense, adapters["one"]])):
        with pytest.raises(AdapterError, match=r"full rank.*rank=.*save_dense"):
            use()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["addition", "ties"])
def test_the_error_of_a_merge_that_is_cut_down_is_what_each_module_lost(adapters, method):
    folders = [adapters[name] for name in ("one", "lora", "mlp")]
    whole, cut = merge(folders, method), merge(folders, method, rank=4)
    for module in cut.factors:
        _, error = reference.best_of_rank(delta(whole, module), 4)
        assert cut.errors[module] == pytest.approx(error, abs=1e-4)


def test_hiplora_adapters_keep_their_gains_if_asked_to(adapters):
    folders = [adapters["one"], adapters["two"]]
    cut = merge(folders, rank=4, keep_channels=True)
    gains = sum(read_update(folder).channels[Q0].delta for folder in folders)
    torch.testing.assert_close(cut.channels[Q0].delta, gains)
    assert set(cut.ranks.values()) == {4 + 6}
    assert max(cut.errors.values()) > 1e-3


def test_two_revisions_of_one_base_are_two_bases(adapters, tmp_path):
    folders = [shutil.copytree(adapters[name], tmp_path / name) for name in ("lora", "mlp")]
    edit_config(folders[1], revision="v2")
    with pytest.raises(AdapterError, match="revision v2"):
        merge(folders)
    edit_config(folders[0], revision="v2")
    assert merge(folders).config["revision"] == "v2"


@pytest.mark.parametrize("method", ["addition", "ties"])
def test_no_rule_merges_adapters_of_different_base_weights(adapters, tmp_path, method):
    other = save_tiny(tmp_path / "other", seed=1)
    foreign, _ = saved(other, tmp_path / "foreign", hip_config())
    with pytest.raises(AdapterError, match=r"layer model\.layers\.0\.self_attn\.k_proj: .*different base weights"):
        merge([adapters["one"], foreign], method)
    with pytest.raises(AdapterError, match="not the one that this adapter was made for"):
        merge([adapters["one"], adapters["lora"]], method, base=str(other))


def test_differently_named_bases_are_refused_unless_the_base_or_fingerprints_settle_it(
    adapters, tiny_model_dir, tmp_path
):
    renamed = rename_base(adapters["lora"], tmp_path / "renamed", "somebody/else")
    with pytest.raises(AdapterError, match=r"somebody/else; if these are the same model, name it: pass base=…"):
        merge([adapters["mlp"], renamed])
    update = merge([adapters["one"], renamed], base=str(tiny_model_dir))
    assert_is_sum(update, [(1, adapters["one"]), (1, adapters["lora"])])
    moved = rename_base(adapters["two"], tmp_path / "moved", "a/copy")
    assert_is_sum(merge([adapters["one"], moved]), [(1, adapters["one"]), (1, adapters["two"])])


def test_modules_saved_whole_cannot_be_added(adapters, tiny_model_dir, tmp_path):
    whole, _ = saved(tiny_model_dir, tmp_path / "a", hip_config(modules_to_save=["lm_head"]))
    with pytest.raises(AdapterError, match=r"replaces whole modules \(lm_head\.weight\)"):
        merge([adapters["one"], whole])
    assert set(merge([whole]).extras) == {"lm_head.weight"}
    assert set(merge([whole], "ties", rank=3).extras) == {"lm_head.weight"}


def test_a_leaky_adapter_is_refused(adapters, tiny_model_dir, tmp_path):
    folder, module = leaky(tiny_model_dir, tmp_path / "a")
    with pytest.raises(AdapterError, match=f"{module} leaks"):
        merge([adapters["one"], folder])


@pytest.mark.parametrize(
    ("count", "arguments", "why"),
    [
        (2, {"weights": (1,)}, "1 given for 2 adapters"),
        (2, {"weights": (1, float("nan"))}, "not a finite number"),
        (2, {"weights": (1, True)}, "not a finite number"),
        (0, {}, "at least one adapter"),
        (2, {"rank": 0}, "rank is 0; expected a whole number of 1 or more"),
        (2, {"rank": 1.5}, "rank is 1.5"),
    ],
)
def test_arguments_out_of_range_are_refused(adapters, count, arguments, why):
    with pytest.raises(ConfigError, match=why):
        merge([adapters["one"], adapters["two"]][:count], **arguments)
