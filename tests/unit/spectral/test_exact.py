import pytest
import torch

from hiplora.spectral import exact
from hiplora.spectral.exact import full_svd, gram_svd
from tests import reference
from tests.unit.spectral.matrices import gaussian, power_law, with_spectrum

WEIGHTS = {
    "tall": power_law(90, 40),
    "wide": power_law(40, 90),
    "square": gaussian(50, 50),
    "rank below k": with_spectrum([3.0, 2.0], 40, 50),
    "steep": with_spectrum([10.0**-i for i in range(20)], 60, 50),
    "diagonal": torch.diag(torch.arange(30.0)),
}


@pytest.mark.parametrize("method", [gram_svd, full_svd])
@pytest.mark.parametrize("name", WEIGHTS)
def test_triplets_satisfy_their_definition_in_float64(name, method):
    weight, k = WEIGHTS[name], 10
    U, sigma, V = method(weight, k)
    W = weight.double()
    limit = 1e-7 * sigma[0]
    assert (W @ V - U * sigma).norm(dim=0).max() < limit
    assert (W.T @ U - V * sigma).norm(dim=0).max() < limit
    for basis in (U, V):
        torch.testing.assert_close(basis.T @ basis, torch.eye(k).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(sigma, reference.dense_svd(weight, k)[1], rtol=0, atol=limit.item())


def test_chunks_of_rows_do_not_change_the_result(monkeypatch):
    whole = gram_svd(WEIGHTS["tall"], 10)
    monkeypatch.setattr(exact, "_CHUNK_ELEMENTS", 7 * 40)
    for one, other in zip(whole, gram_svd(WEIGHTS["tall"], 10), strict=True):
        torch.testing.assert_close(one.abs(), other.abs(), rtol=0, atol=1e-9)
