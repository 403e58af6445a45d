"""Protected subspaces united: nothing is lost, nothing counted twice."""

import pytest
import torch

from hiplora.spectral import truncated_svd
from hiplora.spectral.union import unite, united_factors


def basis(n, k, seed):
    return torch.linalg.qr(torch.randn(n, k, generator=torch.Generator().manual_seed(seed))).Q


def inside(basis, directions):
    return directions - basis @ (basis.T @ directions)


def test_a_union_spans_all_bases_with_the_first_one_first():
    first, second = basis(12, 3, 0), basis(12, 4, 1)
    found = unite([first, second], 12)
    assert found.shape == (12, 7)
    assert torch.allclose(found.T @ found, torch.eye(7), atol=1e-6)
    for one in (first, second):
        assert inside(found, one).norm() < 1e-5
    assert inside(unite([first, second], 4)[:, :3], first).norm() < 1e-5


def test_directions_that_are_there_already_add_nothing():
    first = basis(12, 3, 0)
    assert unite([first, first @ basis(3, 3, 2)], 12).shape == (12, 3)


@pytest.mark.parametrize(("before", "k"), [(4, 7), (9, 10)])
def test_united_factors_protect_both_sides_and_are_diagonal(before, k):
    weight = torch.randn(20, 24, generator=torch.Generator().manual_seed(3))
    later = truncated_svd(weight, 3)
    U, V = basis(20, before, 4), basis(24, before, 5)
    found = united_factors(weight, (U, V), later)
    assert found.rank == k  # at most half of the smaller side
    middle = found.U.T @ weight @ found.V
    assert torch.allclose(middle, middle.diag().diag(), atol=1e-4)
    assert inside(found.U, U).norm() < 1e-4
    assert inside(found.V, V).norm() < 1e-4
