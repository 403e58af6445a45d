import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils

from hiplora.errors import ConfigError
from hiplora.merging.magnitude import Options, combine
from hiplora.merging.term import DenseTerm
from tests import reference
from tests.unit.merging.test_ties import updates


def merged(parts, weights, **options):
    return combine((DenseTerm(p.clone(), w) for p, w in zip(parts, weights, strict=True)), Options(**options))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(0, 1000), st.sampled_from([0.05, 0.2, 0.7]), st.data())
def test_it_is_what_peft_computes(count, seed, density, data):
    weights = data.draw(st.lists(st.floats(-2, 2), min_size=count, max_size=count))
    parts = updates(count, seed)
    expected = merge_utils.magnitude_prune(parts, torch.tensor(weights), density)
    torch.testing.assert_close(merged(parts, weights, density=density), expected, rtol=1e-5, atol=1e-6)


def test_it_is_the_sum_of_the_trimmed_updates():
    parts, weights = updates(3), [1.0, -0.5, 2.0]
    expected = sum(w * reference.without_small_entries(p, 0.2) for p, w in zip(parts, weights, strict=True))
    torch.testing.assert_close(merged(parts, weights), expected.float(), rtol=1e-5, atol=1e-6)


def test_at_density_one_it_is_the_sum_of_the_updates():
    parts, weights = updates(3), [1.0, -0.5, 2.0]
    expected = sum(w * p for p, w in zip(parts, weights, strict=True))
    torch.testing.assert_close(merged(parts, weights, density=1.0), expected, rtol=1e-5, atol=1e-6)


def test_a_density_that_is_no_share_is_refused():
    with pytest.raises(ConfigError, match="density is 2"):
        Options(density=2)
