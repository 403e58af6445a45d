"""Block Golub-Kahan iteration, fully reorthogonalised, with thick restarts: W is only multiplied with."""

from typing import NamedTuple

import torch
from torch import Tensor

from hiplora.spectral.factors import Triplets, widest

MAX_BLOCKS = 6  # of the basis before it is compressed
_MAX_PRODUCTS = 150  # blocks; a flat random 4096² matrix, the hardest of practice, takes about 30
_NOISE = 1e-6  # a direction with less than this share of σ_1 left after projection in fp32 is rounding
_MARGIN = 0.5  # stop at half the tolerance: the estimate is made in fp32, the certificate in float64


class _Space(NamedTuple):
    """`W right = left @ core`: orthonormal fp32 `left` (m, p), `right` (n, p); float64 `core` (p, p)."""

    left: Tensor
    right: Tensor
    core: Tensor


class _Extension(NamedTuple):
    """Candidates `(d, b) = basis @ overlap + vectors @ remainder`, `vectors` orthonormal, off the basis."""

    vectors: Tensor
    overlap: Tensor
    remainder: Tensor


def block_size(k: int) -> int:
    """Width of the block for k triplets: wide enough to meet every copy of a repeated singular value."""
    return max(16, k + 4)


def block_krylov(weight: Tensor, k: int, tol: float, generator: torch.Generator) -> Triplets:
    """Return k leading Ritz triplets of an fp32 weight (m, n) whose estimated residual is below `tol`·σ_1.

    The basis grows a block at a time; when it holds `MAX_BLOCKS` blocks it is compressed to its best Ritz pairs (thick
    restart). Needs `min(m, n) > MAX_BLOCKS` blocks. After a great many products the caller's certificate decides.
    """
    (m, n), block = weight.shape, block_size(k)
    space = _Space(weight.new_empty(m, 0), weight.new_empty(n, 0), weight.new_empty(0, 0, dtype=widest(weight.device)))
    right = _extend(space.right, _random(n, block, weight, generator), 1.0, generator).vectors
    scale = 0.0
    for product in range(1, _MAX_PRODUCTS + 1):
        grown = _extend(space.left, weight @ right, scale, generator)
        space = _grow(space, right, grown)
        P, sigma, Qt = torch.linalg.svd(space.core, full_matrices=False)
        scale = sigma[0].item()
        following = _extend(space.right, weight.T @ grown.vectors, scale, generator)
        # Wᵀ left = right coreᵀ + following.vectors remainder [0 … 0 I], so this is the whole residual.
        coupling = following.remainder.to(P.dtype) @ P[-block:, :k]
        residual = torch.linalg.vector_norm(coupling, dim=0).max().item()
        if residual <= _MARGIN * tol * scale or product == _MAX_PRODUCTS:
            break
        right = following.vectors
        if space.core.shape[0] >= MAX_BLOCKS * block:
            space = _compress(space, P, sigma, Qt, keep=k + (MAX_BLOCKS * block - k) // 3)
    left = _orthonormal(space.left.to(P.dtype) @ P[:, :k])
    return Triplets(left, sigma[:k], _orthonormal(space.right.to(P.dtype) @ Qt[:k].T))


def _extend(basis: Tensor, candidates: Tensor, scale: float, generator: torch.Generator) -> _Extension:
    """Orthonormalise `candidates` against `basis`, twice; draw columns anew where only rounding is left of them."""
    overlap = basis.T @ candidates
    rest = candidates - basis @ overlap
    correction = basis.T @ rest
    rest = rest - basis @ correction
    vectors, triangle = torch.linalg.qr(rest)
    size = triangle.diagonal().abs()
    noise = size <= _NOISE * max(scale, size.max().item())
    if noise.any():
        vectors = torch.where(noise, _random(vectors.shape[0], vectors.shape[1], vectors, generator), vectors)
        vectors = vectors - basis @ (basis.T @ vectors)
    vectors = torch.linalg.qr(vectors - basis @ (basis.T @ vectors)).Q
    return _Extension(vectors, overlap + correction, vectors.T @ rest)


def _grow(space: _Space, right: Tensor, grown: _Extension) -> _Space:
    """Append one block to both bases; its coefficients become the last columns of the core."""
    p, b = space.core.shape[0], right.shape[1]
    core = space.core.new_zeros(p + b, p + b)
    core[:p, :p] = space.core
    core[:p, p:] = grown.overlap
    core[p:, p:] = grown.remainder
    return _Space(torch.cat([space.left, grown.vectors], 1), torch.cat([space.right, right], 1), core)


def _compress(space: _Space, P: Tensor, sigma: Tensor, Qt: Tensor, keep: int) -> _Space:
    """Keep the best Ritz pairs: the relation `W right = left @ core` holds on the smaller basis too."""
    left = space.left @ P[:, :keep].to(space.left.dtype)
    right = space.right @ Qt[:keep].T.to(space.right.dtype)
    return _Space(left, right, torch.diag(sigma[:keep]))


def _orthonormal(vectors: Tensor) -> Tensor:
    """Remove the fp32 rounding from nearly orthonormal columns, keeping each one's direction and sign."""
    Q, R = torch.linalg.qr(vectors)
    return Q * torch.where(R.diagonal() < 0, -1.0, 1.0).to(Q)


def _random(rows: int, columns: int, like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator, device="cpu").to(like)
