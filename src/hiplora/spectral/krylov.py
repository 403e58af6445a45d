"""Block Golub-Kahan iteration with full reorthogonalisation and thick restarts: W is only ever multiplied with."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]

_DEPENDENT = (
    1e-5  # in fp32 a direction that keeps less than this share of σ_1 after projection is rounding noise
)
_ESTIMATE_MARGIN = 0.5  # stop at half the tolerance: the estimate is fp32, the certificate is not


class Triplets(NamedTuple):
    """Ritz triplets in float64: U (m, k), sigma (k,) descending, V (n, k)."""

    U: Tensor
    sigma: Tensor
    V: Tensor


class _Space(NamedTuple):
    """`W right = left @ core`, `left` (m, p) and `right` (n, p) orthonormal in fp32, `core` (p, p) in float64."""

    left: Tensor
    right: Tensor
    core: Tensor


def block_krylov(
    weight: Tensor,
    k: int,
    tol: float,
    generator: torch.Generator,
    *,
    block: int,
    max_blocks: int,
    max_products: int,
) -> Triplets:
    """Return k leading Ritz triplets of an fp32 weight (m, n) whose estimated residual is below `tol`·σ_1.

    The basis grows by `block` directions a time; when it holds `max_blocks` blocks it is compressed to its
    best Ritz vectors and goes on (thick restart). A block at least as wide as k finds every copy of a
    repeated singular value that is wanted. Gives up after `max_products` block products and returns what
    it has: the caller's certificate decides.
    """
    m, n = weight.shape
    fresh = torch.randn(n, block, generator=generator).to(weight.device)
    right = _extend(weight.new_empty(n, 0), fresh, 1.0, generator).vectors
    space = _Space(weight.new_empty(m, 0), weight.new_empty(n, 0), weight.new_empty(0, 0).to(_wide(weight)))
    scale = 0.0
    for step in range(max_products):
        grown = _extend(space.left, weight @ right, scale, generator)
        space = _grow(space, right, grown)
        last = grown.vectors
        P, sigma, Qt = torch.linalg.svd(space.core, full_matrices=False)
        scale = sigma[0].item()
        following = _extend(space.right, weight.T @ last, scale, generator)
        coupling = following.remainder.to(P.dtype) @ P[-block:, :k]
        converged = torch.linalg.vector_norm(coupling, dim=0).max().item() <= tol * _ESTIMATE_MARGIN * scale
        if converged or step == max_products - 1:
            break
        right = following.vectors
        if space.core.shape[0] >= max_blocks * block:
            space = _compress(space, P, sigma, Qt, keep=k + (max_blocks * block - k) // 3)
    wide = _wide(weight)
    return Triplets(space.left.to(wide) @ P[:, :k], sigma[:k], space.right.to(wide) @ Qt[:k].T)


class _Extension(NamedTuple):
    vectors: Tensor  # (d, b): orthonormal, and orthogonal to the basis
    overlap: Tensor  # (p, b): the part of the candidates inside the basis
    remainder: Tensor  # (b, b): vectorsᵀ candidates


def _extend(basis: Tensor, candidates: Tensor, scale: float, generator: torch.Generator) -> _Extension:
    """Orthonormalise `candidates` against `basis`; directions that were rounding noise are drawn anew."""
    overlap = basis.T @ candidates
    rest = candidates - basis @ overlap
    again = basis.T @ rest
    rest = rest - basis @ again
    vectors, triangle = torch.linalg.qr(rest)
    threshold = _DEPENDENT * max(scale, triangle.diagonal().abs().max().item())
    noise = triangle.diagonal().abs() <= threshold
    if noise.any():
        drawn = torch.randn(vectors.shape, generator=generator).to(vectors)
        vectors = torch.where(noise, drawn, vectors)
    if basis.shape[1]:
        vectors = vectors - basis @ (basis.T @ vectors)
        vectors = vectors - basis @ (basis.T @ vectors) if noise.any() else vectors
    if noise.any() or basis.shape[1]:
        vectors = torch.linalg.qr(vectors).Q
    return _Extension(vectors, overlap + again, vectors.T @ rest)


def _grow(space: _Space, right: Tensor, grown: _Extension) -> _Space:
    """Append one block to both bases; the core gets the block's coefficients as its last columns."""
    p, b = space.core.shape[0], right.shape[1]
    core = space.core.new_zeros(p + b, p + b)
    core[:p, :p] = space.core
    core[:p, p:] = grown.overlap
    core[p:, p:] = grown.remainder
    return _Space(torch.cat([space.left, grown.vectors], 1), torch.cat([space.right, right], 1), core)


def _compress(space: _Space, P: Tensor, sigma: Tensor, Qt: Tensor, keep: int) -> _Space:
    """Keep the best Ritz pairs: the same relation `W right = left @ core` on a smaller basis."""
    left = space.left @ P[:, :keep].to(space.left.dtype)
    right = space.right @ Qt[:keep].T.to(space.right.dtype)
    return _Space(left, right, torch.diag(sigma[:keep]))


def _wide(weight: Tensor) -> torch.dtype:
    """float64, except on devices that have none (Apple's)."""
    return torch.float32 if weight.device.type == "mps" else torch.float64
