import math

import pytest
import torch

from hiplora.spectral import (
    allocate,
    fused_factors,
    leak,
    retract,
    soften,
    truncated_svd,
)
from tests import reference
from tests.unit.spectral.matrices import gaussian


@pytest.fixture
def parts():
    """A weight's factors and random adapter factors: m = 20, n = 14, k = 4, r = 3."""
    factors = truncated_svd(gaussian(20, 14), 4)
    A, B, delta = gaussian(3, 14, seed=1), gaussian(20, 3, seed=2), gaussian(1, 4, seed=3)[0]
    return A, B, delta, factors.U, factors.V


def test_retraction_writes_new_tensors_and_leaves_its_arguments_alone(parts):
    A, B, _, U, V = parts
    before = A.clone(), B.clone()
    A_new, B_new = retract(A, B, U, V)
    assert torch.equal(A, before[0])
    assert torch.equal(B, before[1])
    assert not torch.allclose(A_new, A)
    assert not torch.allclose(B_new, B)


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


def test_zero_factors_leak_nothing(parts):
    A, B, _, U, V = parts
    assert leak(torch.zeros_like(A), torch.zeros_like(B), U, V) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_factor_leaks_infinitely(parts, bad):
    A, B, _, U, V = parts
    assert leak(A * bad, B, U, V) == math.inf
    assert leak(A, B * bad, U, V) == math.inf


def test_the_leak_of_half_precision_factors_does_not_overflow(parts):
    A, B, _, U, V = (tensor.half() for tensor in parts)
    assert leak(A * 2e4, B * 2e4, U, V) == pytest.approx(leak(A, B, U, V), rel=1e-2)


def test_fused_factors_have_the_documented_layout(parts):
    A, B, delta, U, V = parts
    A_fused, B_fused = fused_factors(A, B, delta, U, V, 2.0)
    assert torch.equal(A_fused, torch.cat([A, V.T]))
    assert torch.equal(B_fused, torch.cat([2 * B, U * delta], dim=1))


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


def test_the_hard_projection_is_the_soft_one_that_lets_nothing_pass():
    A, B, U, V, *_ = soft_parts()
    one = torch.eye(4).double()
    for soft, hard in zip(soften(A, B, U, V, one, one), retract(A, B, U, V), strict=True):
        torch.testing.assert_close(soft, hard)


def test_a_side_without_a_filter_is_left_free():
    A, B, U, V, *_ = soft_parts()
    one = torch.eye(4).double()
    assert soften(A, B, U, V, None, one)[1] is B
    assert soften(A, B, U, V, one, None)[0] is A


def test_a_complete_basis_leaves_exactly_nothing():
    A, B = gaussian(3, 6), gaussian(4, 3)
    U = torch.linalg.qr(gaussian(4, 4)).Q
    kept_A, kept_B = retract(A, B, U, torch.zeros(6, 0))
    assert torch.equal(kept_A, A)
    assert not kept_B.any()
    assert leak(kept_A, kept_B, U, torch.zeros(6, 0)) == 0


@pytest.fixture
def bases():
    factors = truncated_svd(gaussian(20, 14), 4)
    return factors.U, factors.V


def test_a_zero_update_has_no_energy_to_place(bases):
    result = allocate(torch.zeros(20, 3), gaussian(3, 14), *bases)
    assert (result.left, result.right, result.both, result.norm) == (0, 0, 0, 0)


def test_one_sided_projections_are_told_apart(bases):
    A, B = gaussian(3, 14, seed=1), gaussian(20, 3, seed=2)
    A_out, B_out = retract(A, B, *bases)
    reads = allocate(B_out, A, *bases)
    assert reads.left < 1e-12 < 1e-3 < reads.right
    writes = allocate(B, A_out, *bases)
    assert writes.right < 1e-12 < 1e-3 < writes.left


@pytest.mark.parametrize("q", [1, 3, 30])
def test_factors_of_any_width_agree_with_the_dense_update(bases, q):
    P, Q = gaussian(20, q, seed=1), gaussian(q, 14, seed=2)
    result = allocate(P, Q, *bases)
    expected = reference.energy_fractions(P.double() @ Q.double(), *bases)
    assert (result.left, result.right, result.both) == pytest.approx(expected, rel=1e-6)
    U, V = reference.f64(*bases)
    torch.testing.assert_close(result.gains, (U.T @ P.double() @ Q.double() @ V).diagonal())


def test_columns_that_nearly_cancel_keep_their_accuracy(bases):
    column, row = gaussian(20, 1, seed=1).double(), gaussian(1, 14, seed=2).double()
    tiny = 1e-6 * gaussian(1, 14, seed=3).double()
    P, Q = torch.cat([column, -column], 1), torch.cat([row + tiny, row])
    result = allocate(P, Q, *bases)
    assert result.norm == pytest.approx((column @ tiny).norm().item(), rel=1e-6)
