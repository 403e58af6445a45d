import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiplora.errors import ConfigError
from hiplora.merging.term import Term
from hiplora.merging.tsv import Options, combine
from tests import reference
from tests.unit.merging.terms import M, dense, hip_term, lora_term, make, matrices, weights

kinds = st.sampled_from(["shared", "elsewhere", "proj", "lora"])
several = st.lists(
    st.tuples(kinds, st.integers(0, 20), st.floats(-2, 2)), min_size=1, max_size=4, unique_by=lambda s: s[1]
)


def ranks(terms):
    return [len(reference.nonzero_svd(update)[1]) for update in matrices(terms)]


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(several)
def test_in_factor_space_it_is_what_it_is_on_dense_updates(specs):
    terms = [make(*spec) for spec in specs]
    counts = [max(1, M // len(terms))] * len(terms)
    factors, channels = combine(terms, Options())
    expected = reference.tsv(matrices(terms), weights(terms), counts)
    torch.testing.assert_close(dense(factors), expected, rtol=1e-3, atol=1e-4)
    assert channels is None


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(several, st.sampled_from([0.3, 0.5, 1.0]))
def test_a_share_of_each_updates_own_triplets_is_rounded_up(specs, share):
    terms = [make(*spec) for spec in specs]
    counts = [math.ceil(share * rank) for rank in ranks(terms)]
    factors, _ = combine(terms, Options(sv_reduction=share))
    assert factors[0].shape[0] == sum(counts)
    expected = reference.tsv(matrices(terms), weights(terms), counts)
    torch.testing.assert_close(dense(factors), expected, rtol=1e-3, atol=1e-4)


def test_thin_updates_of_wide_layers_keep_all_their_triplets():
    """Two updates of rank 4 in a layer of 40 × 60: a half of 40 is more than they have."""
    terms = [lora_term(seed, m=40, n=60, rank=4) for seed in (1, 2)]
    assert combine(terms, Options())[0][0].shape[0] == 8


@pytest.mark.parametrize("term", [lora_term(3), hip_term(2), lora_term(5, -1.5)])
def test_one_adapter_is_that_adapter(term):
    torch.testing.assert_close(
        dense(combine([term], Options())[0]), term.weight * dense(term.factors), rtol=1e-5, atol=1e-5
    )


def test_updates_whose_directions_are_orthogonal_add_up():
    eye = torch.eye(8)
    one = Term((eye[:2], 2 * eye[:, :2]))
    other = Term((eye[2:4], 3 * eye[:, 4:6]), -1.0)
    expected = dense(one.factors) - dense(other.factors)
    torch.testing.assert_close(dense(combine([one, other], Options())[0]), expected, rtol=1e-6, atol=1e-6)


def test_an_update_merged_with_itself_is_itself():
    """Where directions are the same, none is made up: the polar factor is a partial isometry."""
    term = lora_term(1, m=40, n=60, rank=3)
    torch.testing.assert_close(
        dense(combine([term, term], Options())[0]), dense(term.factors), rtol=1e-5, atol=1e-5
    )


def test_a_zero_update_takes_no_direction():
    term = lora_term(1, m=40, n=60, rank=3)
    A, B = lora_term(2, m=40, n=60, rank=3).factors
    nothing = Term((A, torch.zeros_like(B)))
    torch.testing.assert_close(
        dense(combine([term, nothing], Options())[0]), dense(term.factors), rtol=1e-5, atol=1e-5
    )
    assert dense(combine([nothing], Options())[0]).abs().max() == 0


@pytest.mark.parametrize("share", [0, 1.5, True, "half"])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ConfigError, match="sv_reduction is"):
        Options(sv_reduction=share)
