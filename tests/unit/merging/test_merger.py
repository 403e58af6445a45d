"""Merging whole adapters: sums, truncation, dense merges, and what is refused."""

import shutil

import pytest
import torch
from peft import PeftModel

from hiplora.adapters import BaseWeights, read_update, save_as_lora
from hiplora.errors import AdapterError, ConfigError
from hiplora.merging import RULES, DenseMerge, merge
from tests.tiny import save_tiny
from tests.unit.adapters.samples import (
    Q0,
    assert_is,
    base_model,
    deltas,
    edit_config,
    hip_config,
    leaky,
    product,
    saved,
    weighted_sum,
)
from tests.unit.merging.terms import lora_term

ALL = ("one", "two", "three", "other rank", "proj", "lora", "mlp", "patterns", "adalora", "pissa")
WEIGHTS = (1, -1, 0.5, 0, 2, -0.25, 1, 0.5, -2, 0.1)


def delta(update, module):
    return update.delta(module) if isinstance(update, DenseMerge) else product(update, module)


def copy(folder, to, **changes):
    edit_config(shutil.copytree(folder, to), **changes)
    return to


def test_a_merge_of_all_kinds_is_the_weighted_sum_in_memory_and_loaded_by_stock_peft(adapters, tmp_path):
    folders = [adapters[name] for name in ALL]
    update = merge(folders, weights=WEIGHTS)
    assert_is(update, weighted_sum(map(read_update, folders), WEIGHTS), rtol=1e-4)
    save_as_lora(update, tmp_path / "out")
    assert_is(update, deltas(PeftModel.from_pretrained(base_model(adapters.base), tmp_path / "out").eval()))
    again = read_update(tmp_path / "out")
    for module, pair in update.factors.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, again.factors[module], strict=True))


@pytest.mark.parametrize("method", RULES)
def test_every_rule_merges_all_kinds_of_adapters_module_by_module(adapters, method):
    folders = [adapters[name] for name in ALL]
    update = merge(folders, method)
    assert set(update.modules) == {module for folder in folders for module in read_update(folder).factors}
    down = "model.layers.0.mlp.down_proj"  # adapted by two of them
    alone = merge([adapters["patterns"], adapters["adalora"]], method)
    torch.testing.assert_close(delta(update, down), delta(alone, down))


def test_each_module_draws_by_itself():
    rule, terms = RULES["dare"], [lora_term(1)]
    update = DenseMerge("", "merged", {}, {}, terms={"a": terms, "b": terms}, rule=rule, options=rule.options())
    assert not torch.equal(update.delta("a"), update.delta("b"))


def test_a_dense_merge_is_not_a_lora_adapter_and_not_merged_again(adapters, tmp_path):
    dense = merge([adapters["one"], adapters["lora"]], "ties")
    for use in (lambda: save_as_lora(dense, tmp_path / "out"), lambda: merge([dense, adapters["one"]])):
        with pytest.raises(AdapterError, match=r"full rank.*rank=.*save_dense"):
            use()
    assert not (tmp_path / "out").exists()


def test_hiplora_adapters_keep_their_gains_if_asked_to(adapters):
    folders = [adapters["one"], adapters["two"]]
    cut = merge(folders, rank=4, keep_channels=True)
    gains = sum(read_update(folder).channels[Q0].delta for folder in folders)
    torch.testing.assert_close(cut.channels[Q0].delta, gains)
    assert set(cut.ranks.values()) == {4 + 6}
    assert max(cut.errors.values()) > 1e-3
    assert not merge(folders, rank=4).channels


@pytest.mark.parametrize("method", ["addition", "ties"])
def test_adapters_of_different_base_weights_are_refused(adapters, tmp_path, method):
    other = save_tiny(tmp_path / "other", seed=1)
    foreign, _ = saved(other, tmp_path / "foreign", hip_config())
    renamed = copy(adapters["lora"], tmp_path / "renamed", base_model_name_or_path="somebody/else")
    revised = copy(adapters["mlp"], tmp_path / "revised", revision="v2")
    leaking, module = leaky(adapters.base, tmp_path / "leaky")
    for folders, base, why in (
        (["one", foreign], None, r"layer model\.layers\.0\.self_attn\.k_proj: .*different base weights"),
        (["one", "lora"], str(other), "not the one that this adapter was made for"),
        (["mlp", renamed], None, r"somebody/else; if these are the same model, name it: pass base=…"),
        (["lora", revised], None, "revision v2"),
        (["one", "hip whole"], None, r"replaces whole modules \(lm_head\.weight\)"),
        (["one", leaking], None, f"{module} leaks"),
    ):
        with pytest.raises(AdapterError, match=why):
            merge([adapters[one] if isinstance(one, str) else one for one in folders], method, base=base)
    assert merge([revised, revised]).config["revision"] == "v2"


def test_differently_named_bases_are_merged_if_the_base_or_fingerprints_settle_it(adapters, tmp_path):
    for name, base in (("lora", str(adapters.base)), ("two", None)):
        moved = copy(adapters[name], tmp_path / name, base_model_name_or_path="a/copy")
        expected = weighted_sum([read_update(adapters["one"]), read_update(adapters[name])], [1, 1])
        assert_is(merge([adapters["one"], moved], base=base), expected, rtol=1e-4)


def test_one_adapter_alone_keeps_the_modules_that_it_saves_whole(adapters):
    for how in ({}, {"method": "ties", "rank": 3}):
        assert set(merge([adapters["hip whole"]], **how).extras) == {"lm_head.weight"}

    for weight in (0.5, -1.0):
        with pytest.raises(AdapterError, match=rf"lm_head.weight.* its weight is {weight:g}, give it 1"):
            merge([adapters["hip whole"]], weights=[weight])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_adapters_made_in_different_precisions_are_merged_in_any_order(adapters, tmp_path, order):
    folders = []
    for dtype, target in ((torch.float32, "q_proj"), (torch.bfloat16, "v_proj")):
        folders.append(saved(adapters.base, tmp_path / target, hip_config(target_modules=[target]), dtype=dtype)[0])
    merged = merge([folders[one] for one in order])
    assert_is(merged, weighted_sum([read_update(folder) for folder in folders], [1, 1]))
    for module in merged.modules:
        BaseWeights.of(merged).weight(module, merged)


@pytest.mark.parametrize("how", [{"rank": 4}, {"method": "ties"}, {"method": "tsv"}])
def test_what_was_trained_over_quantised_weights_is_merged_into_the_stored_ones(adapters, tmp_path, how):
    four_bits = copy(adapters["one"], tmp_path / "quantised", base_precision="bitsandbytes 4bit")
    edit_config(four_bits, fingerprints=dict.fromkeys(read_update(four_bits).modules, "of rounded weights"))
    merged = merge([adapters["lora"], four_bits], **how)
    for module in merged.modules:
        assert torch.equal(BaseWeights.of(merged).weight(module, merged), BaseWeights.of(merged).weight(module))


@pytest.mark.parametrize(
    ("count", "arguments", "why"),
    [
        (2, {"weights": (1,)}, "1 given for 2 adapters"),
        (2, {"weights": (1, float("nan"))}, "not a finite number"),
        (0, {}, "at least one adapter"),
        (2, {"rank": 0}, "rank is 0; expected a whole number of 1 or more"),
    ],
)
def test_arguments_out_of_range_are_refused(adapters, count, arguments, why):
    with pytest.raises(ConfigError, match=why):
        merge([adapters["one"], adapters["two"]][:count], **arguments)
