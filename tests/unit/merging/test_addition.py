import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiplora.adapters import Channels
from hiplora.merging.addition import Options, combine
from hiplora.merging.term import Term
from tests.unit.merging.terms import K, dense, expected_sum, hip_term, lora_term, make

numbers = st.floats(-3, 3).filter(lambda value: value == 0 or abs(value) > 1e-3)
kinds = st.sampled_from(["shared", "elsewhere", "proj", "lora"])
sums = st.lists(st.tuples(kinds, st.integers(0, 20), numbers), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(sums)
def test_the_product_of_the_sum_is_the_sum_of_the_products(specs):
    terms = [make(*spec) for spec in specs]
    factors, _ = combine(terms, Options())
    torch.testing.assert_close(dense(factors), expected_sum(terms), rtol=1e-5, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(sums, st.randoms())
def test_the_order_changes_nothing_in_the_product(specs, random):
    terms = [make(*spec) for spec in specs]
    shuffled = random.sample(terms, len(terms))
    torch.testing.assert_close(
        dense(combine(terms, Options())[0]), dense(combine(shuffled, Options())[0]), rtol=1e-5, atol=1e-5
    )


@settings(max_examples=30, deadline=None)
@given(sums)
def test_the_channels_that_are_kept_are_the_merged_update(specs):
    terms = [make(*spec) for spec in specs]
    factors, channels = combine(terms, Options())
    if channels is not None:
        torch.testing.assert_close(dense(channels.factors()), dense(factors))


@pytest.mark.parametrize("make_term", [hip_term, lora_term])
def test_one_term_of_weight_one_is_that_term_bit_for_bit(make_term):
    term = make_term(2, 1.0)
    factors, _ = combine([term], Options())
    assert all(torch.equal(one, other) for one, other in zip(factors, term.factors, strict=True))


def test_a_term_of_weight_zero_leaves_the_first_bit_for_bit():
    first = hip_term(1, 1.0)
    factors, _ = combine([first, hip_term(2, 0.0), lora_term(3, 0.0)], Options())
    assert all(torch.equal(one, other) for one, other in zip(factors, first.factors, strict=True))


def test_in_a_shared_basis_gains_add_and_ranks_are_the_sum_plus_k():
    one, other = hip_term(1, 2.0), hip_term(2, -0.5)
    factors, channels = combine([one, other], Options())
    assert factors[0].shape[0] == 2 + 3 + K
    torch.testing.assert_close(channels.delta, 2.0 * one.channels.delta - 0.5 * other.channels.delta)
    assert channels.leak() < 1e-5


def test_in_another_basis_gains_do_not_add():
    factors, channels = combine([hip_term(1, 1.0), hip_term(2, 1.0, basis_seed=1)], Options())
    assert factors[0].shape[0] == 2 + K + 3 + K
    assert channels is None


def test_a_rotated_basis_of_the_same_span_does_not_count_as_shared():
    """Inside a cluster of singular values two decompositions differ by a rotation: δ_1 means something else then."""
    one, other = hip_term(1, 1.0), hip_term(2, 1.0)
    turn = torch.linalg.qr(torch.randn(K, K)).Q
    parts = other.channels
    rotated = Channels(parts.A, parts.B, parts.U @ turn, parts.sigma, parts.V @ turn, parts.delta, 1.5, 1e-4)
    terms = [one, Term(rotated.factors(), 1.0, rotated)]
    torch.testing.assert_close(dense(combine(terms, Options())[0]), expected_sum(terms), rtol=1e-5, atol=1e-5)


def test_proj_lora_adds_its_residual_to_the_shared_basis():
    factors, channels = combine([hip_term(1, 1.0), hip_term(2, 1.0, gains=False)], Options())
    assert factors[0].shape[0] == 2 + 3 + K
    assert channels is not None


def test_all_weights_zero_give_a_zero_update():
    factors, _ = combine([hip_term(1, 0.0), lora_term(1, 0.0)], Options())
    assert dense(factors).abs().max() == 0
