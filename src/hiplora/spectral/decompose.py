"""Certified truncated SVD: every set of factors is measured against its weight before anyone may use it."""

import torch
from torch import Tensor

from hiplora.errors import ConfigError, FactorError
from hiplora.spectral.exact import full_svd, gram_svd, row_chunks
from hiplora.spectral.factors import SpectralFactors, weight_fingerprint
from hiplora.spectral.krylov import Triplets, block_krylov

METHODS = ("auto", "exact", "krylov", "randomized")
_SAFE = (1e-12, 1e12)  # largest |entry| between which fp32 products and their squares stay in range
_MAX_BLOCKS = 6
_MAX_PRODUCTS = 120
_EXACT_BELOW = 1024


def truncated_svd(
    weight: Tensor,
    k: int,
    tol: float = 1e-4,
    method: str = "auto",
    *,
    name: str = "weight",
    oversampling: int = 8,
    power_iterations: int = 2,
    seed: int = 0,
) -> SpectralFactors:
    """Factor a weight (m, n) into its k leading singular triplets, with a certificate.

    `method="exact"` decomposes densely in float64; `"krylov"` only multiplies by W and Wᵀ and goes on until
    the residual is below `tol`; `"auto"` takes the cheaper of the two; `"randomized"` is the paper's
    (`oversampling`, `power_iterations`), whose residual is reported but not enforced. Any floating dtype,
    device and memory layout; computed from the weight's fp32 values, so the same values give the same
    factors. Signs: the largest |entry| of each u is positive.

    Raises:
        FactorError: not a finite floating matrix, k outside 1 … min(m, n), or the tolerance was missed;
            the message begins with `layer {name}`.
        ConfigError: unknown method, or a tolerance that is not positive.
    """
    if method not in METHODS:
        raise ConfigError(f"method {method!r}: expected one of {', '.join(METHODS)}")
    if not tol > 0:
        raise ConfigError(
            f"svd_tolerance {tol}: expected a number > 0, as a share of the largest singular value"
        )
    matrix, scale = _checked(weight, k, name)
    if scale == 0:
        triplets, used = _zero(matrix, k), "exact"
    elif method == "randomized":
        triplets, used = _randomized(matrix, k, oversampling, power_iterations, _generator(seed)), method
    else:
        triplets, used = _accurate(matrix, k, tol, method, _generator(seed))
    factors = _certified(matrix, triplets, used, scale, weight_fingerprint(weight))
    if used == "exact" and factors.residual > tol:
        factors = _certified(matrix, full_svd(matrix, k), used, scale, factors.fingerprint)
    if method != "randomized" and not factors.residual <= tol:
        raise FactorError(
            f"layer {name}: the decomposition ({used}) reached a residual of {factors.residual:.1e} of the largest "
            f"singular value, above svd_tolerance {tol:.1e}; raise svd_tolerance"
            + (" or use method='exact'" if used == "krylov" else "")
        )
    return factors


def _checked(weight: Tensor, k: int, name: str) -> tuple[Tensor, float]:
    """Validate; return the weight as a contiguous fp32 matrix of safe magnitude, and the factor taken out."""
    if weight.dim() != 2:
        raise FactorError(f"layer {name}: expected a matrix (out, in), got shape {tuple(weight.shape)}")
    if not weight.is_floating_point():
        raise FactorError(
            f"layer {name}: dtype {weight.dtype} holds packed or integer values; dequantise the weight first"
        )
    if k < 1:
        raise FactorError(f"layer {name}: principal_rank {k} must be at least 1")
    if k > min(weight.shape):
        raise FactorError(
            f"layer {name}: principal_rank {k} exceeds min(out, in) = {min(weight.shape)}; "
            "lower it or set principal_rank_pattern"
        )
    matrix = weight.detach().to(torch.float32).contiguous()
    low, high = torch.aminmax(matrix)
    largest = max(-low.item(), high.item())
    if not largest < float("inf"):
        bad = int((~torch.isfinite(matrix)).sum())
        raise FactorError(
            f"layer {name}: {bad} of {matrix.numel()} values are NaN or Inf (in float32); the checkpoint is damaged"
        )
    if largest == 0 or _SAFE[0] < largest < _SAFE[1]:
        return matrix, float(largest > 0)
    return (matrix.double() / largest).float(), largest


def _accurate(
    matrix: Tensor, k: int, tol: float, method: str, generator: torch.Generator
) -> tuple[Triplets, str]:
    block = max(16, k + 4)
    small = min(matrix.shape)
    fits = (_MAX_BLOCKS + 1) * block <= small
    if method == "exact" or not fits or (method == "auto" and small < _EXACT_BELOW):
        return gram_svd(matrix, k), "exact"
    triplets = block_krylov(
        matrix, k, tol, generator, block=block, max_blocks=_MAX_BLOCKS, max_products=_MAX_PRODUCTS
    )
    return triplets, "krylov"


def _randomized(
    matrix: Tensor, k: int, oversampling: int, iterations: int, generator: torch.Generator
) -> Triplets:
    """The paper's range finder: a random block of k + oversampling columns and a few power iterations."""
    width = min(k + oversampling, *matrix.shape)
    probe = torch.randn(matrix.shape[1], width, generator=generator).to(matrix.device)
    Q = torch.linalg.qr(matrix @ probe).Q
    for _ in range(iterations):
        Q = torch.linalg.qr(matrix.T @ Q).Q
        Q = torch.linalg.qr(matrix @ Q).Q
    P, sigma, Vt = torch.linalg.svd(Q.T @ matrix, full_matrices=False)
    return Triplets(Q @ P[:, :k], sigma[:k], Vt[:k].T)


def _zero(matrix: Tensor, k: int) -> Triplets:
    """Any orthonormal vectors do for an all-zero weight: take coordinate axes."""
    m, n = matrix.shape
    return Triplets(*(torch.eye(m, k), torch.zeros(k), torch.eye(n, k)))


def _certified(
    matrix: Tensor, triplets: Triplets, method: str, scale: float, fingerprint: str
) -> SpectralFactors:
    """Fix the signs, round to fp32, and measure the residual and orthogonality of the rounded tensors."""
    U, sigma, V = (tensor.to(matrix.device) for tensor in triplets)
    peak = U.gather(0, U.abs().argmax(0, keepdim=True)).squeeze(0)
    flip = torch.where(peak < 0, -1.0, 1.0).to(U.dtype)
    U, sigma, V = (
        tensor.to(torch.float32).contiguous() for tensor in (U * flip, sigma.clamp_min(0), V * flip)
    )
    residual = _residual(matrix, U, sigma, V)
    return SpectralFactors(
        U, sigma * scale if scale else sigma, V, residual, _orthogonality(U, V), method, "weight", fingerprint
    )


def _residual(matrix: Tensor, U: Tensor, sigma: Tensor, V: Tensor) -> float:
    wide = torch.float32 if matrix.device.type == "mps" else torch.float64
    U, sigma, V = (tensor.to(wide) for tensor in (U, sigma, V))
    if sigma[0] == 0:
        return 0.0
    back = torch.zeros_like(V)
    forward = torch.zeros_like(sigma)
    start = 0
    for rows in row_chunks(matrix):
        block, U_rows = rows.to(wide), U[start : start + rows.shape[0]]
        forward += (block @ V - sigma * U_rows).square().sum(0)
        back.addmm_(block.T, U_rows)
        start += rows.shape[0]
    backward = (back - sigma * V).square().sum(0)
    return (torch.maximum(forward, backward).max().sqrt() / sigma[0]).item()


def _orthogonality(U: Tensor, V: Tensor) -> float:
    errors = []
    for basis in (U, V):
        wide = basis if basis.device.type == "mps" else basis.double()
        gram = wide.T @ wide
        errors.append((gram - torch.eye(gram.shape[0]).to(gram)).abs().max().item())
    return max(errors)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
