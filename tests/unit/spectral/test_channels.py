"""Leak, projections, budget and allocation at their edges; tests/property has the algebra."""

import math

import pytest
import torch

from hiplora.errors import ConfigError
from hiplora.spectral import (
    SIDES,
    allocate,
    budget_weights,
    leak,
    protected,
    proximal_step,
    retract,
    soften,
    truncated_svd,
)
from tests.unit.spectral.matrices import gaussian

SIGMA = torch.tensor([8.0, 4.0, 2.0, 1.0])


@pytest.fixture
def parts():
    """Random adapter factors and a weight's bases: m = 20, n = 14, k = 4, r = 3."""
    factors = truncated_svd(gaussian(20, 14), 4)
    return gaussian(3, 14, seed=1), gaussian(20, 3, seed=2), factors.U, factors.V


def test_leak_is_the_larger_share_of_the_two_sides(parts):
    A, B, U, V = parts
    A_in, B_in = retract(A, B, U, V)
    left, right = ((torch.linalg.norm(one) / torch.linalg.norm(of)).item() for one, of in ((U.T @ B, B), (A @ V, A)))
    assert leak(A_in, B_in, U, V) < 1e-6
    assert leak(A_in, B, U, V) == pytest.approx(left, rel=1e-5)
    assert leak(A, B_in, U, V) == pytest.approx(right, rel=1e-5)
    assert leak(A, B, U, V) == pytest.approx(max(left, right), rel=1e-5)
    assert leak(torch.zeros_like(A), torch.zeros_like(B), U, V) == 0
    for bad in (math.nan, math.inf):
        assert leak(A * bad, B, U, V) == leak(A, B * bad, U, V) == math.inf
    A, B, U, V = (tensor.half() for tensor in parts)
    assert leak(A * 2e4, B * 2e4, U, V) == pytest.approx(leak(A, B, U, V), rel=1e-2)  # no overflow


def test_the_soft_projection_is_the_filter_by_energy_whatever_the_rotation():
    A, B, V, U, Q = (gaussian(*shape).double() for shape in ((3, 12), (9, 3), (12, 4), (9, 4), (4, 4)))
    V, U, Q = (torch.linalg.qr(one).Q for one in (V, U, Q))
    energies = torch.tensor([100.0, 9.0, 4.0, 1.0]).double()
    full = torch.eye(12).double() + V @ energies.diag() @ V.T  # (I + C/ε) with ε = 1
    share = (energies / (energies + 1)).diag()
    soft_A, soft_B = soften(A, B, U @ Q, V @ Q, *[Q.T @ share @ Q] * 2)
    torch.testing.assert_close(soft_A, A @ torch.linalg.inv(full))
    torch.testing.assert_close(soft_B, B - U @ share @ U.T @ B)
    one = torch.eye(4).double()  # lets nothing pass; a side without a filter is free
    torch.testing.assert_close(soften(A, B, U, V, one, one), retract(A, B, U, V))
    assert soften(A, B, U, V, None, one)[1] is B
    assert soften(A, B, U, V, one, None)[0] is A


@pytest.mark.parametrize("sides", SIDES)
def test_a_free_side_is_left_alone_and_does_not_leak(parts, sides):
    A, B, U, V = parts
    bases = protected(U, V, sides)
    kept_A, kept_B = retract(A, B, *bases)
    assert torch.equal(kept_A, A) == (sides == "output")
    assert torch.equal(kept_B, B) == (sides == "input")
    assert leak(A, B, *bases) > 0.1
    assert leak(kept_A, kept_B, *bases) < 1e-6


def test_a_complete_basis_leaves_exactly_nothing():
    A, B, U = gaussian(3, 6), gaussian(4, 3), torch.linalg.qr(gaussian(4, 4)).Q
    kept_A, kept_B = retract(A, B, U, torch.zeros(6, 0))
    assert torch.equal(kept_A, A)
    assert not kept_B.any()


def test_an_allocation_of_nothing_of_one_side_and_of_columns_that_nearly_cancel(parts):
    A, B, *bases = parts
    nothing = allocate(torch.zeros_like(B), A, *bases)
    assert (nothing.left, nothing.right, nothing.both, nothing.norm) == (0, 0, 0, 0)
    A_out, B_out = retract(A, B, *bases)
    reads, writes = allocate(B_out, A, *bases), allocate(B, A_out, *bases)
    assert reads.left < 1e-12 < 1e-3 < reads.right
    assert writes.right < 1e-12 < 1e-3 < writes.left
    column, row, tiny = B[:, :1].double(), A[:1].double(), 1e-6 * A[1:2].double()
    result = allocate(torch.cat([column, -column], 1), torch.cat([row + tiny, row]), *bases)
    assert result.norm == pytest.approx((column @ tiny).norm().item(), rel=1e-6)


@pytest.mark.parametrize(("sigma", "gamma"), [(SIGMA, 0.0), (torch.zeros(4), 0.0), (torch.zeros(4), 2.0)])
def test_gamma_zero_and_a_zero_spectrum_weigh_all_directions_alike(sigma, gamma):
    assert torch.equal(budget_weights(sigma, gamma), torch.full((4,), 0.25))


@pytest.mark.parametrize("scale", [1e-38, 1e38])
@pytest.mark.parametrize("gamma", [1.0, 50.0, 1e6])
def test_no_gamma_and_no_scale_overflows(scale, gamma):
    weights = budget_weights(torch.tensor([2.0, 1.0, 0.0]) * scale, gamma)
    assert torch.isfinite(weights).all()
    assert weights.sum().item() == pytest.approx(1)
    assert weights[0] > weights[1] >= weights[2]


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_a_step_or_a_gamma_without_meaning_is_refused(bad):
    with pytest.raises(ConfigError, match="proximal step"):
        proximal_step(torch.ones(4), SIGMA, bad)
    with pytest.raises(ConfigError, match="stability_gamma"):
        budget_weights(SIGMA, bad)
