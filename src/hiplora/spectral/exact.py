"""Exact truncated decompositions of an fp32 weight in float64: by the Gram matrix, or by LAPACK's SVD."""

from collections.abc import Iterator

import torch
from torch import Tensor

from hiplora.spectral.factors import Triplets

_CHUNK_ELEMENTS = 1 << 22  # float64 copies of the weight are made 32 MiB at a time


def gram_svd(weight: Tensor, k: int) -> Triplets:
    """Leading triplets from the eigenvectors of the smaller Gram matrix, in float64.

    Squaring loses σ_i below about 1e-8 σ_1, which is less than fp32 factors resolve; the caller's
    certificate checks it all the same.
    """
    if weight.shape[0] < weight.shape[1]:
        V, sigma, U = gram_svd(weight.T, k)
        return Triplets(U, sigma, V)
    gram = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)
    for rows in row_chunks(weight):
        wide = rows.double()
        gram.addmm_(wide.T, wide)
    V = torch.linalg.eigh(gram).eigenvectors[:, -k:].flip(1)
    image = torch.cat([rows.double() @ V for rows in row_chunks(weight)])
    # The columns of WV are orthogonal up to rounding; QR also completes the ones that are zero.
    U, triangle = torch.linalg.qr(image)
    gains = triangle.diagonal()
    sigma, order = gains.abs().sort(descending=True)
    return Triplets((U * torch.where(gains < 0, -1.0, 1.0).to(U))[:, order], sigma, V[:, order])


def full_svd(weight: Tensor, k: int) -> Triplets:
    """Leading triplets from LAPACK's full SVD in float64: slow, and accurate whatever the spectrum."""
    U, sigma, Vt = torch.linalg.svd(weight.double(), full_matrices=False)
    return Triplets(U[:, :k], sigma[:k], Vt[:k].T)


def row_chunks(weight: Tensor) -> Iterator[Tensor]:
    """Cut a matrix into blocks of rows small enough to copy in float64."""
    rows = max(1, _CHUNK_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        yield weight[start : start + rows]
