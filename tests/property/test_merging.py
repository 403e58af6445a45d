"""The identities of merging, rule by rule, on random adapters of one base model."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiplora.adapters import AdapterUpdate
from hiplora.merging import RULES, DenseMerge, merge
from tests.unit.merging.terms import dense, make

few = settings(max_examples=15, deadline=None, derandomize=True, database=None)
every_rule = pytest.mark.parametrize("method", RULES)

# What makes a rule leave a single adapter as it is. Iso-C flattens its spectrum whatever its options.
WHOLE = {"addition": {}, "tsv": {}, **{name: {"density": 1.0} for name in ("ties", "dare", "magnitude", "knots")}}

kinds = st.sampled_from(["shared", "elsewhere", "proj", "lora"])
numbers = st.floats(0.25, 2).flatmap(lambda size: st.sampled_from([size, -size]))


def adapter(kinds, seed):
    """An update of up to two modules, `a` and `b`, of different kinds and ranks."""
    terms = {name: make(kind, seed + 7 * i, 1.0) for i, (name, kind) in enumerate(kinds.items())}
    return AdapterUpdate(
        "base",
        "lora",
        {},
        {name: term.factors for name, term in terms.items()},
        channels={name: term.channels for name, term in terms.items() if term.channels is not None},
        source=f"adapter {seed}",
    )


modules = st.one_of(st.fixed_dictionaries({"a": kinds, "b": kinds}), st.fixed_dictionaries({"a": kinds}))
some = st.lists(modules, min_size=1, max_size=4).map(
    lambda rows: [adapter(row, seed) for seed, row in enumerate(rows)]
)


def deltas(merged):
    """ΔW of every module, dense."""
    if isinstance(merged, DenseMerge):
        return {module: merged.delta(module).double() for module in merged.modules}
    return {module: dense(factors) for module, factors in merged.factors.items()}


def assert_same(found, expected, tol=1e-4):
    found, expected = deltas(found), deltas(expected)
    assert set(found) == set(expected)
    for module, delta in expected.items():
        torch.testing.assert_close(found[module], delta, rtol=tol, atol=tol, msg=lambda m, k=module: f"{k}: {m}")


@every_rule
@few
@given(adapters=some, data=st.data())
def test_the_order_does_not_matter(method, adapters, data):
    weights = [data.draw(numbers) for _ in adapters]
    order = data.draw(st.permutations(range(len(adapters))))
    shuffled = merge([adapters[i] for i in order], method, [weights[i] for i in order])
    assert_same(shuffled, merge(adapters, method, weights))


@every_rule
@few
@given(adapters=some)
def test_adapters_of_weight_zero_take_no_part(method, adapters):
    weights = [1.0] + [0.0] * (len(adapters) - 1)
    alone, among = merge(adapters[:1], method), merge(adapters, method, weights)
    found, expected = deltas(among), deltas(alone)
    assert set(found) == set(expected)
    assert all(torch.equal(found[module], expected[module]) for module in expected)


@pytest.mark.parametrize("method", WHOLE)
@few
@given(kinds=modules, seed=st.integers(0, 50))
def test_one_adapter_merged_is_that_adapter(method, kinds, seed):
    one = adapter(kinds, seed)
    assert_same(merge([one], method, options=WHOLE[method]), one)


@every_rule
@few
@given(adapters=some, factor=numbers, data=st.data())
def test_a_factor_of_all_weights_is_one_of_the_merge(method, adapters, factor, data):
    """Negative factors as well: what is subtracted is what would have been added."""
    weights = [data.draw(numbers) for _ in adapters]
    whole = deltas(merge(adapters, method, weights))
    for module, delta in deltas(merge(adapters, method, [factor * w for w in weights])).items():
        torch.testing.assert_close(delta, factor * whole[module], rtol=1e-4, atol=1e-4)


@every_rule
@few
@given(adapters=some)
def test_only_the_products_count_and_not_how_they_are_factored(method, adapters):
    """Factors are rotated among themselves; a rule that averaged A and B apart would fail. DARE draws by factors."""
    options = {"density": 1.0} if method == "dare" else {}

    def rotated(update):
        factors = {}
        for module, (A, B) in update.factors.items():
            turn = torch.linalg.qr(torch.randn(len(A), len(A))).Q + 0.1 * torch.eye(len(A))
            factors[module] = turn @ A, B @ torch.linalg.inv(turn)
        return replace(update, factors=factors, channels={})

    assert_same(
        merge([rotated(update) for update in adapters], method, options=options),
        merge(adapters, method, options=options),
        tol=1e-3,
    )


@every_rule
@few
@given(adapters=some)
def test_all_weights_zero_give_a_zero_update_of_all_modules(method, adapters):
    found = deltas(merge(adapters, method, [0.0] * len(adapters)))
    assert set(found) == {module for update in adapters for module in update.factors}
    assert all(delta.abs().max() == 0 for delta in found.values())


@pytest.mark.parametrize("method", [name for name, rule in RULES.items() if "scale" in rule.defaults])
@few
@given(adapters=some, scale=numbers)
def test_the_scale_is_a_factor_of_the_merge(method, adapters, scale):
    whole = deltas(merge(adapters, method))
    for module, delta in deltas(merge(adapters, method, options={"scale": scale})).items():
        torch.testing.assert_close(delta, scale * whole[module], rtol=1e-4, atol=1e-4)


@every_rule
@few
@given(adapters=some, rank=st.integers(1, 4))
def test_a_merge_cut_down_is_the_nearest_of_its_rank(method, adapters, rank):
    whole, cut = deltas(merge(adapters, method)), merge(adapters, method, rank=rank)
    for module, delta in deltas(cut).items():
        sigma = torch.linalg.svdvals(whole[module])
        lost = torch.linalg.norm(whole[module] - delta)
        torch.testing.assert_close(lost, sigma[rank:].norm(), rtol=1e-3, atol=1e-3)
        assert cut.errors[module] * sigma.norm() == pytest.approx(lost.item(), rel=1e-3, abs=1e-3)
        assert cut.ranks[module] <= rank
