import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils

from hiplora.errors import ConfigError
from hiplora.merging.term import DenseTerm
from hiplora.merging.ties import Options, combine
from tests import reference

few = settings(max_examples=30, deadline=None, derandomize=True, database=None)


def updates(count, seed=0, shape=(11, 13)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def merged(parts, weights=None, **options):
    weights = weights or [1.0] * len(parts)
    terms = (DenseTerm(part.clone(), weight) for part, weight in zip(parts, weights, strict=True))
    return combine(terms, Options(**options))


@few
@given(st.integers(1, 4), st.integers(0, 1000), st.sampled_from([0.05, 0.2, 0.7, 0.999]), st.data())
def test_it_is_what_peft_computes(count, seed, density, data):
    weights = data.draw(st.lists(st.floats(-2, 2), min_size=count, max_size=count))
    parts = updates(count, seed)
    expected = merge_utils.ties(parts, torch.tensor(weights), density)
    torch.testing.assert_close(merged(parts, weights, density=density), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("density", [0.2, 1.0])
def test_it_is_the_paper_entry_by_entry(count, density):
    parts, weights = updates(count), [1.0, 0.5, -2.0][:count]
    expected = reference.ties(parts, weights, density, scale=0.7)
    found = merged(parts, weights, density=density, scale=0.7)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)


def test_the_defaults_are_the_papers():
    assert Options() == Options(density=0.2, scale=1.0)


def test_signs_that_lose_the_vote_do_not_count():
    parts = [torch.tensor([[3.0, 1.0]]), torch.tensor([[-1.0, 1.0]]), torch.tensor([[1.0, -5.0]])]
    assert merged(parts, density=1.0).tolist() == [[2.0, -5.0]]


def test_weights_scale_what_is_averaged_and_not_the_vote():
    parts = [torch.tensor([[3.0]]), torch.tensor([[-2.0]])]
    assert merged(parts, [0.1, 10.0], density=1.0).item() == pytest.approx(0.3)


def test_one_update_is_trimmed_and_kept_whole_only_at_density_one():
    (part,) = updates(1)
    assert torch.equal(merged([part], density=1.0), part)
    assert int((merged([part]) != 0).sum()) == int(0.2 * part.numel())


def test_the_blocks_of_rows_change_nothing():
    """More entries than one block has: 2²⁰."""
    parts = updates(2, shape=(700, 3000))
    expected = merge_utils.ties(parts, torch.ones(2), 0.2)
    torch.testing.assert_close(merged(parts), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("density", [0, -0.1, 1.1, float("nan"), True, "0.2", None])
def test_a_density_that_is_no_share_is_refused(density):
    with pytest.raises(ConfigError, match=r"density is .*; expected a number above 0 and up to 1"):
        Options(density=density)


@pytest.mark.parametrize("scale", [float("inf"), "1", None, False])
def test_a_scale_that_is_no_number_is_refused(scale):
    with pytest.raises(ConfigError, match=r"scale is .*; expected a finite number"):
        Options(scale=scale)
