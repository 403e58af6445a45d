"""Parts of a weight against their definitions, dense and in float64."""

import pytest
import torch

from hiplora.spectral import minor_part, restricted_part


def weight_of(m, n, seed=1):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (12, 12)])
def test_the_minor_part_is_the_weight_on_its_smallest_singular_values(shape):
    W = weight_of(*shape)
    B, A = minor_part(W, 4)
    U, sigma, Vt = torch.linalg.svd(W.double(), full_matrices=False)
    torch.testing.assert_close((B @ A).double(), U[:, 8:] * sigma[8:] @ Vt[8:], rtol=0, atol=1e-5)
    for gram in (B.T @ B, A @ A.T):  # √σ to each
        torch.testing.assert_close(gram.double(), torch.diag(sigma[8:]), rtol=0, atol=1e-5)


def test_all_of_a_weight_is_minor_where_no_direction_is_left():
    W = weight_of(6, 9)
    B, A = minor_part(W, 6)
    torch.testing.assert_close(B @ A, W, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_the_restricted_part_acts_as_the_weight_in_the_directions_and_not_beside_them(shape):
    W = weight_of(*shape)
    N = torch.linalg.qr(weight_of(shape[1], 5, seed=2)).Q
    B, A = restricted_part(W, N)
    assert (B.shape, A.shape) == ((shape[0], 5), (5, shape[1]))
    torch.testing.assert_close(B @ A, W @ N @ N.T, rtol=0, atol=1e-5)
    x = weight_of(shape[1], 3, seed=3)
    torch.testing.assert_close(B @ (A @ (x - N @ (N.T @ x))), torch.zeros(shape[0], 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(B.T @ B, A @ A.T, rtol=0, atol=1e-5)


def test_a_part_of_a_16_bit_weight_is_fp32():
    W = weight_of(6, 9).bfloat16()
    for B, A in (minor_part(W, 2), restricted_part(W, torch.eye(9)[:, :2])):
        assert (B.dtype, A.dtype) == (torch.float32, torch.float32)
