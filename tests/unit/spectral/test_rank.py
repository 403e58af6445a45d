"""How many directions a layer protects, in each of the ways of asking for it."""

import pytest
import torch

from hiplora.spectral import is_rank, parse_rank, resolve_rank, squared_singular_values

SPECTRUM = torch.tensor([6.0, 2.0, 1.0, 1.0])


def resolved(spec, shape=(4, 9)):
    return resolve_rank(spec, shape, lambda: SPECTRUM)


@pytest.mark.parametrize(
    ("spec", "k"),
    [
        (3, 3),
        (50, 50),
        (0.5, 2),
        (0.01, 1),
        (0.99, 4),
        ("energy:0.6", 1),
        ("energy:0.61", 2),
        ("energy:0.9", 3),
    ],
)
def test_a_rank_by_hand(spec, k):
    assert resolved(spec, (8, 9) if isinstance(spec, str) else (4, 9)) == k


def test_no_more_directions_than_the_smaller_side_has():
    assert resolved(0.9, (2, 9)) == 2


def test_a_share_of_the_energy_leaves_half_of_the_directions_to_learn_in():
    assert resolved("energy:0.99", (4, 9)) == 2
    assert resolved("energy:0.99", (1, 9)) == 1


def test_a_number_needs_no_spectrum():
    assert resolve_rank(3, (4, 4), lambda: pytest.fail("asked for")) == 3
    assert resolve_rank(0.5, (4, 4), lambda: pytest.fail("asked for")) == 2


def test_nothing_but_zeros_has_one_direction():
    assert resolve_rank("energy:0.9", (4, 4), lambda: torch.zeros(4)) == 1


@pytest.mark.parametrize("spec", [1, 0.5, "energy:0.95"])
def test_what_is_a_rank(spec):
    assert is_rank(spec)


@pytest.mark.parametrize("spec", [0, -1, True, 0.0, 1.0, 1.5, float("nan"), "energy:0", "energy:1", "32", "", None])
def test_what_is_none(spec):
    assert not is_rank(spec)


@pytest.mark.parametrize(("text", "spec"), [("32", 32), ("0.25", 0.25), ("energy:0.9", "energy:0.9"), ("x", "x")])
def test_a_rank_is_read_as_it_is_typed(text, spec):
    assert parse_rank(text) == spec
    assert type(parse_rank(text)) is type(spec)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_the_energies_of_a_weight_are_its_squared_singular_values(shape):
    weight = torch.randn(shape)
    expected = torch.linalg.svdvals(weight.double()).square()
    torch.testing.assert_close(squared_singular_values(weight), expected)
