import pytest
import torch

from hiplora.spectral import krylov
from hiplora.spectral.krylov import _extend, block_krylov
from tests.unit.spectral.matrices import gaussian, power_law


def generator():
    return torch.Generator().manual_seed(0)


def assert_extends(basis, result):
    joint = torch.cat([basis, result.vectors], 1).double()
    torch.testing.assert_close(joint.T @ joint, torch.eye(joint.shape[1]).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1.0])
@pytest.mark.parametrize(
    "candidates",
    [
        torch.zeros(60, 8),
        torch.eye(60, 8),  # already in the basis, to the last bit
        torch.eye(60, 20)[:, 12:20],  # half of it in the basis
        gaussian(60, 1).repeat(1, 8),
        gaussian(60, 8) * 1e-12,
        gaussian(60, 8),
    ],
    ids=["zero", "in the basis", "half in the basis", "one direction", "rounding noise", "independent"],
)
def test_a_block_is_orthonormal_and_off_the_basis_whatever_the_candidates(candidates, scale):
    basis = torch.eye(60, 16)
    assert_extends(basis, _extend(basis, candidates, scale, generator()))


def test_the_coefficients_rebuild_the_candidates_even_where_the_basis_has_drifted():
    basis = torch.linalg.qr(gaussian(60, 16)).Q + 1e-3 * gaussian(60, 16, seed=1)
    candidates = gaussian(60, 8, seed=2)
    result = _extend(basis, candidates, 1.0, generator())
    torch.testing.assert_close(
        basis @ result.overlap + result.vectors @ result.remainder, candidates, rtol=0, atol=1e-3
    )


def test_ritz_triplets_are_orthonormal_to_float64():
    U, sigma, V = block_krylov(power_law(300, 200), 8, 1e-4, generator())
    for basis in (U, V):
        assert basis.dtype == torch.float64
        torch.testing.assert_close(basis.T @ basis, torch.eye(8).double(), rtol=0, atol=1e-12)
    assert torch.all(sigma[:-1] >= sigma[1:])


def test_a_tighter_tolerance_takes_more_products_and_a_looser_one_fewer(monkeypatch):
    counts = []
    for tol in (1e-1, 1e-3, 1e-5):
        products = []
        grow = krylov._grow
        with monkeypatch.context() as patch:
            patch.setattr(krylov, "_grow", lambda *args, p=products, g=grow: p.append(1) or g(*args))
            block_krylov(gaussian(300, 200), 8, tol, generator())
        counts.append(len(products))
    assert counts[0] < counts[1] < counts[2]
