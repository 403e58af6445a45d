"""How many directions a layer protects, in each of the ways of asking for it."""

import pytest
import torch

from hiplora.spectral import is_rank, parse_rank, resolve_rank, squared_singular_values


@pytest.mark.parametrize(
    ("spec", "shape", "k"),
    [
        (3, (4, 9), 3),
        (50, (4, 9), 50),
        (0.5, (4, 9), 2),
        (0.01, (4, 9), 1),
        (0.9, (2, 9), 2),
        ("energy:0.6", (8, 9), 1),
        ("energy:0.61", (8, 9), 2),
        ("energy:0.9", (8, 9), 3),
        ("energy:0.99", (4, 9), 2),  # half of them, so that a complement is left
        ("energy:0.99", (1, 9), 1),
    ],
)
def test_a_rank_by_hand(spec, shape, k):
    spectrum = torch.tensor([6.0, 2.0, 1.0, 1.0])
    assert resolve_rank(spec, shape, (lambda: spectrum) if isinstance(spec, str) else pytest.fail) == k
    assert resolve_rank("energy:0.9", shape, lambda: torch.zeros(4)) == 1


def test_what_is_a_rank_and_what_is_none():
    assert all(map(is_rank, [1, 0.5, "energy:0.95"]))
    assert not any(map(is_rank, [0, -1, True, 0.0, 1.0, float("nan"), "energy:0", "energy:1", "32", "", None]))


@pytest.mark.parametrize(("text", "spec"), [("32", 32), ("0.25", 0.25), ("energy:0.9", "energy:0.9"), ("x", "x")])
def test_a_rank_is_read_as_it_is_typed(text, spec):
    assert parse_rank(text) == spec
    assert type(parse_rank(text)) is type(spec)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_the_energies_of_a_weight_are_its_squared_singular_values(shape):
    weight = torch.randn(shape)
    expected = torch.linalg.svdvals(weight.double()).square()
    torch.testing.assert_close(squared_singular_values(weight), expected)
