import pytest
import torch

from hiplora.adapters import AdapterUpdate, read_update
from hiplora.errors import ConfigError
from hiplora.merging import DenseMerge, TruncatedUpdate, merge, truncate
from tests import reference
from tests.unit.adapters.samples import product
from tests.unit.merging.terms import dense, hip_term, lora_term

Q0 = "model.layers.0.self_attn.q_proj"


def update(**terms):
    return AdapterUpdate(
        "base",
        "merged",
        {},
        {name: term.factors for name, term in terms.items()},
        channels={name: term.channels for name, term in terms.items() if term.channels is not None},
    )


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_it_is_the_best_approximation_of_that_rank(rank):
    whole = update(a=lora_term(3, rank=6), b=hip_term(1, rank=2))
    cut = truncate(whole, rank)
    for module, factors in whole.factors.items():
        expected, error = reference.best_of_rank(dense(factors), rank)
        torch.testing.assert_close(dense(cut.factors[module]), expected, rtol=1e-5, atol=1e-5)
        assert cut.errors[module] == pytest.approx(error, rel=1e-5)
        assert cut.rank(module) == rank
    assert not cut.channels


def test_a_module_of_no_higher_rank_stays_as_it_is_bit_for_bit():
    whole = update(a=lora_term(3, rank=2), b=hip_term(1, rank=2))
    cut = truncate(whole, 5)
    assert cut.factors["a"] is whole.factors["a"]
    assert cut.channels["b"] is whole.channels["b"]
    assert cut.errors == {"a": 0.0, "b": 0.0}


def test_with_the_channels_kept_only_the_residual_is_cut():
    whole = update(a=hip_term(1, rank=3))
    cut, before = truncate(whole, 1, keep_channels=True), whole.channels["a"]
    after = cut.channels["a"]
    assert torch.equal(after.delta, before.delta)
    assert after.A.shape[0] == 1
    assert after.leak() < 1e-5
    near, _ = reference.best_of_rank(before.B @ before.A, 1)
    torch.testing.assert_close(dense((after.A, after.B)), near, rtol=1e-4, atol=1e-5)
    lost = dense(whole.factors["a"]) - dense(cut.factors["a"])
    assert cut.errors["a"] == pytest.approx((lost.norm() / dense(whole.factors["a"]).norm()).item(), rel=1e-4)


def test_a_zero_update_loses_nothing():
    A, B = lora_term(3, rank=4).factors
    zero = AdapterUpdate("base", "merged", {}, {"a": (A, torch.zeros_like(B))})
    cut = truncate(zero, 2)
    assert cut.errors == {"a": 0.0}
    assert cut.rank("a") == 1


def test_the_record_has_the_worst_module_first():
    whole = update(a=lora_term(3, rank=2), b=lora_term(4, rank=6), c=lora_term(5, rank=4))
    record = truncate(whole, 2).to_json()
    errors = [entry["relative_error"] for entry in record["modules"]]
    assert errors == sorted(errors, reverse=True)
    assert record["modules"][-1] == {"module": "a", "relative_error": 0.0}
    assert record["rank"] == 2


def test_a_bar_can_follow():
    seen = []
    truncate(update(a=lora_term(1)), 1, wrap=lambda names: (seen.append(name) or name for name in names))
    assert seen == ["a"]


@pytest.mark.parametrize("rank", [0, -1, 1.5, True, "8"])
def test_a_rank_that_is_none_is_refused(rank):
    with pytest.raises(ConfigError, match=r"rank is .*; expected a whole number of 1 or more"):
        truncate(update(a=lora_term(1)), rank)
    with pytest.raises(ConfigError, match="rank is"):
        merge(["there is no such folder"], rank=rank)


@pytest.mark.parametrize("method", ["addition", "tsv", "ties", "dare"])
def test_every_rule_can_be_cut_down(adapters, method):
    folders = [adapters[name] for name in ("one", "lora", "mlp")]
    whole, cut = merge(folders, method), merge(folders, method, rank=4)
    assert isinstance(cut, TruncatedUpdate)
    assert set(cut.errors) == set(cut.factors)
    for module in cut.factors:
        full = whole.delta(module) if isinstance(whole, DenseMerge) else product(whole, module)
        assert cut.rank(module) <= 4
        _, error = reference.best_of_rank(full, 4)
        found = (product(cut, module) - full).norm() / full.norm()
        assert found.item() == pytest.approx(error, abs=1e-4)
        assert cut.errors[module] == pytest.approx(error, abs=1e-4)


def test_hiplora_adapters_keep_their_gains_if_asked_to(adapters):
    folders = [adapters["one"], adapters["two"]]
    cut = merge(folders, rank=4, keep_channels=True)
    gains = sum(read_update(folder).channels[Q0].delta for folder in folders)
    torch.testing.assert_close(cut.channels[Q0].delta, gains)
    assert set(cut.ranks.values()) == {4 + 6}
    assert max(cut.errors.values()) > 1e-3
