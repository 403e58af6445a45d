import pytest
import torch

from hiplora.spectral import allocate, retract, truncated_svd
from tests import reference
from tests.unit.spectral.matrices import gaussian


@pytest.fixture
def bases():
    factors = truncated_svd(gaussian(20, 14), 4)
    return factors.U, factors.V


def test_an_update_of_the_gains_lies_wholly_inside(bases):
    U, V = bases
    delta = torch.tensor([1.0, -2.0, 0.5, 0.0])
    result = allocate(U * delta, V.T.contiguous(), U, V)
    assert (result.left, result.right, result.both) == pytest.approx((1, 1, 1))
    assert result.norm == pytest.approx(delta.norm().item())
    torch.testing.assert_close(result.gains.float(), delta, rtol=1e-5, atol=1e-6)


def test_a_retracted_update_lies_wholly_outside(bases):
    A, B = retract(gaussian(3, 14, seed=1), gaussian(20, 3, seed=2), *bases)
    result = allocate(B, A, *bases)
    assert max(result.left, result.right, result.both) < 1e-12
    assert result.gains.abs().max() < 1e-5
    assert result.norm == pytest.approx((B @ A).norm().item(), rel=1e-5)


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
