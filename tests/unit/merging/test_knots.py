import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiplora.errors import ConfigError
from hiplora.merging.knots import Options, combine
from tests import reference
from tests.unit.merging.terms import M, N, dense, hip_term, lora_term, make, matrices, weights

kinds = st.sampled_from(["shared", "elsewhere", "proj", "lora"])


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.tuples(kinds, st.integers(0, 20), st.floats(-2, 2)),
        min_size=1,
        max_size=4,
        unique_by=lambda s: s[1],
    ),
    st.sampled_from([0.2, 0.6, 1.0]),
)
def test_in_factor_space_it_is_what_it_is_on_dense_updates(specs, density):
    terms = [make(*spec) for spec in specs]
    factors, channels = combine(terms, Options(density=density, scale=0.5))
    expected = reference.knots(matrices(terms), weights(terms), density, 0.5)
    torch.testing.assert_close(dense(factors), expected, rtol=1e-4, atol=1e-5)
    assert channels is None


def test_the_rank_is_the_sum_of_the_ranks_at_most():
    one, two = lora_term(1, rank=2), lora_term(2, rank=3)
    assert combine([one, two], Options())[0][0].shape == (5, N)
    assert combine([lora_term(seed, rank=4) for seed in range(3)], Options())[0][1].shape == (M, M)


def test_outputs_that_adapters_share_are_one_direction():
    """Two HiP-LoRA adapters of one basis, k = 3 and r = 2 each: 3 + 2 + 2 directions."""
    terms = [hip_term(1, rank=1), hip_term(4, rank=1)]
    assert combine(terms, Options())[0][0].shape[0] == 3 + 1 + 1


def test_one_adapter_at_density_one_is_that_adapter():
    term = hip_term(2)
    torch.testing.assert_close(
        dense(combine([term], Options(density=1.0))[0]), dense(term.factors), rtol=1e-5, atol=1e-5
    )


def test_a_zero_update_gives_a_zero_update():
    A, B = lora_term(1).factors
    term = type(lora_term(1))((A, torch.zeros_like(B)))
    assert dense(combine([term], Options())[0]).abs().max() == 0


def test_an_option_that_makes_no_sense_is_refused():
    with pytest.raises(ConfigError, match="density is 0"):
        Options(density=0)
