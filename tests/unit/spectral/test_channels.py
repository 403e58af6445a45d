import math

import pytest
import torch

from hiplora.spectral import SIDES, allocate, leak, protected, retract, soften, truncated_svd
from tests.unit.spectral.matrices import gaussian


@pytest.fixture
def parts():
    """A weight's factors and random adapter factors: m = 20, n = 14, k = 4, r = 3."""
    factors = truncated_svd(gaussian(20, 14), 4)
    A, B, delta = gaussian(3, 14, seed=1), gaussian(20, 3, seed=2), gaussian(1, 4, seed=3)[0]
    return A, B, delta, factors.U, factors.V


def test_leak_is_the_larger_share_of_the_two_sides(parts):
    A, B, _, U, V = parts
    A_in, B_in = retract(A, B, U, V)
    assert leak(A_in, B_in, U, V) < 1e-6
    left = (torch.linalg.norm(U.T @ B) / torch.linalg.norm(B)).item()
    right = (torch.linalg.norm(A @ V) / torch.linalg.norm(A)).item()
    assert leak(A_in, B, U, V) == pytest.approx(left, rel=1e-5)
    assert leak(A, B_in, U, V) == pytest.approx(right, rel=1e-5)
    assert leak(A, B, U, V) == pytest.approx(max(left, right), rel=1e-5)
    assert leak(V.T[:3].contiguous(), U[:, :3].contiguous(), U, V) == pytest.approx(1, rel=1e-6)


def test_the_leak_of_nothing_is_0_of_what_is_broken_infinite_and_of_half_precision_no_overflow(parts):
    A, B, _, U, V = parts
    assert leak(torch.zeros_like(A), torch.zeros_like(B), U, V) == 0
    for bad in (math.nan, math.inf):
        assert leak(A * bad, B, U, V) == leak(A, B * bad, U, V) == math.inf
    A, B, _, U, V = (tensor.half() for tensor in parts)
    assert leak(A * 2e4, B * 2e4, U, V) == pytest.approx(leak(A, B, U, V), rel=1e-2)


def soft_parts(m=9, n=12, k=4, r=3):
    """Directions with energies, and the same rotated inside their subspaces, as factors have them."""
    generator = torch.Generator().manual_seed(4)
    V, U, Q = (
        torch.linalg.qr(torch.randn(*shape, generator=generator, dtype=torch.float64)).Q
        for shape in ((n, k), (m, k), (k, k))
    )
    energies = torch.tensor([100.0, 9.0, 4.0, 1.0], dtype=torch.float64)
    share = (energies / (energies + 1)).diag()
    A, B = torch.randn(r, n, generator=generator).double(), torch.randn(m, r, generator=generator).double()
    return A, B, U, V, Q, energies, share


def test_the_soft_projection_is_the_filter_by_energy_whatever_the_rotation():
    A, B, U, V, Q, energies, share = soft_parts()
    full = torch.eye(12).double() + V @ energies.diag() @ V.T  # (I + C/ε) with ε = 1
    S = Q.T @ share @ Q
    soft_A, soft_B = soften(A, B, U @ Q, V @ Q, S, S)
    torch.testing.assert_close(soft_A, A @ torch.linalg.inv(full))
    torch.testing.assert_close(soft_B, B - U @ share @ U.T @ B)


def test_the_hard_projection_is_the_soft_one_that_lets_nothing_pass_and_a_side_without_a_filter_is_free():
    A, B, U, V, *_ = soft_parts()
    one = torch.eye(4).double()
    for soft, hard in zip(soften(A, B, U, V, one, one), retract(A, B, U, V), strict=True):
        torch.testing.assert_close(soft, hard)
    assert soften(A, B, U, V, None, one)[1] is B
    assert soften(A, B, U, V, one, None)[0] is A


@pytest.mark.parametrize("sides", SIDES)
def test_a_free_side_is_left_alone_and_does_not_leak(parts, sides):
    A, B, _, U, V = parts
    bases = protected(U, V, sides)
    kept_A, kept_B = retract(A, B, *bases)
    assert torch.equal(kept_A, A) == (sides == "output")
    assert torch.equal(kept_B, B) == (sides == "input")
    assert leak(A, B, *bases) > 0.1
    assert leak(kept_A, kept_B, *bases) < 1e-6


def test_a_complete_basis_leaves_exactly_nothing():
    A, B = gaussian(3, 6), gaussian(4, 3)
    U = torch.linalg.qr(gaussian(4, 4)).Q
    kept_A, kept_B = retract(A, B, U, torch.zeros(6, 0))
    assert torch.equal(kept_A, A)
    assert not kept_B.any()
    assert leak(kept_A, kept_B, U, torch.zeros(6, 0)) == 0


def test_a_zero_update_has_no_energy_and_one_sided_projections_are_told_apart(parts):
    A, B, _, *bases = parts
    nothing = allocate(torch.zeros_like(B), A, *bases)
    assert (nothing.left, nothing.right, nothing.both, nothing.norm) == (0, 0, 0, 0)
    A_out, B_out = retract(A, B, *bases)
    reads, writes = allocate(B_out, A, *bases), allocate(B, A_out, *bases)
    assert reads.left < 1e-12 < 1e-3 < reads.right
    assert writes.right < 1e-12 < 1e-3 < writes.left


def test_columns_that_nearly_cancel_keep_their_accuracy(parts):
    column, row = gaussian(20, 1, seed=1).double(), gaussian(1, 14, seed=2).double()
    tiny = 1e-6 * gaussian(1, 14, seed=3).double()
    P, Q = torch.cat([column, -column], 1), torch.cat([row + tiny, row])
    result = allocate(P, Q, *parts[3:])
    assert result.norm == pytest.approx((column @ tiny).norm().item(), rel=1e-6)
