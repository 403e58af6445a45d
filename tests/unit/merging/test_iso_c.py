import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hiplora.errors import ConfigError
from hiplora.merging.iso_c import Options, combine
from hiplora.merging.term import Term
from tests import reference
from tests.unit.merging.terms import M, N, dense, expected_sum, hip_term, lora_term, make, matrices, weights

kinds = st.sampled_from(["shared", "elsewhere", "proj", "lora"])
numbers = st.floats(-2, 2).filter(lambda value: abs(value) > 0.1)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.tuples(kinds, st.integers(0, 20), numbers), min_size=1, max_size=4, unique_by=lambda s: s[1])
)
def test_in_factor_space_it_is_what_it_is_on_dense_updates(specs):
    terms = [make(*spec) for spec in specs]
    sigma = reference.nonzero_svd(expected_sum(terms))[1]
    assume(sigma[-1] > 1e-3 * sigma[0])  # else rounding decides which directions there are
    factors, channels = combine(terms, Options())
    expected = reference.iso_c(matrices(terms), weights(terms))
    torch.testing.assert_close(dense(factors), expected, rtol=1e-4, atol=1e-4)
    assert channels is None


def test_all_directions_are_equally_strong_and_their_sum_is_kept():
    terms = [lora_term(1, rank=2), lora_term(2, -0.5, rank=2)]
    found = torch.linalg.svdvals(dense(combine(terms, Options())[0]))
    before = torch.linalg.svdvals(expected_sum(terms))
    torch.testing.assert_close(found[:4], found[0].expand(4), rtol=1e-5, atol=0)
    assert found[4:].max() < 1e-5
    torch.testing.assert_close(found.sum(), before.sum(), rtol=1e-5, atol=0)


def test_the_directions_are_those_of_the_sum():
    """What is orthogonal to all updates gets nothing, though the layer has more directions than the sum."""
    terms = [lora_term(1, rank=1), lora_term(2, rank=1)]
    _, _, Vt = torch.linalg.svd(expected_sum(terms))
    assert (dense(combine(terms, Options())[0]) @ Vt[2:].T).abs().max() < 1e-5


def test_one_adapter_is_flattened_unless_it_is_flat():
    term = hip_term(2)
    assert not torch.allclose(dense(combine([term], Options())[0]), dense(term.factors), rtol=1e-2)
    flat = Term((torch.eye(N)[:3], 2 * torch.eye(M)[:, :3]))
    torch.testing.assert_close(dense(combine([flat], Options())[0]), dense(flat.factors))


def test_updates_that_cancel_leave_nothing():
    one = lora_term(3)
    factors, _ = combine([one, Term(one.factors, -1.0)], Options())
    assert dense(factors).abs().max() == 0


def test_the_scale_is_a_factor():
    term = lora_term(3)
    half, whole = (combine([term], Options(scale=scale))[0] for scale in (0.5, 1.0))
    torch.testing.assert_close(dense(half), 0.5 * dense(whole))
    with pytest.raises(ConfigError, match="scale is nan"):
        Options(scale=float("nan"))
