"""Certified truncated SVD: every set of factors is measured against its weight before anyone may use it."""

import dataclasses
import math

import torch
from torch import Tensor

from hiplora.errors import ConfigError, FactorError
from hiplora.spectral.exact import full_svd, gram_svd, row_chunks
from hiplora.spectral.factors import SpectralFactors, Triplets, weight_fingerprint
from hiplora.spectral.krylov import MAX_BLOCKS, block_krylov, block_size
from hiplora.spectral.precision import full_precision, widest

METHODS = ("auto", "exact", "krylov", "randomized")

# Measured on two cores (benchmarks/svd.py): an eigenproblem of this size takes about as long as the iteration.
_EXACT_SIZE = 640
_EXACT_SIZE_PER_RANK = 14
_KRYLOV_FLOOR = 5e-6  # fp32 products cannot promise less
_SAFE_MAGNITUDE = (1e-12, 1e12)  # of the largest |entry|: squares and sums stay in fp32's range


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
    fingerprint: str | None = None,
) -> SpectralFactors:
    """Factor a weight (m, n) into its k leading singular triplets, with a certificate.

    `method="exact"` decomposes densely in float64. `"krylov"` only multiplies by W and Wᵀ and goes on until
    the residual is below `tol` (weights too small for its basis are decomposed exactly). `"auto"` takes the
    cheaper of the two, and the exact one where the iteration missed the tolerance. `"randomized"` is the
    paper's (`oversampling`, `power_iterations`): its residual is reported, not enforced.

    Any floating dtype, device and memory layout. Everything is computed from the weight's fp32 values and
    a seeded generator, so equal values give equal factors; in each u the entry of largest magnitude is
    positive. `fingerprint` saves hashing a weight whose fingerprint the caller has.

    Raises:
        FactorError: not a finite floating matrix, k outside 1 … min(m, n), or the tolerance was missed;
            the message begins with `layer {name}`.
        ConfigError: unknown method, or a tolerance that is not positive.
    """
    if method not in METHODS:
        raise ConfigError(f"method {method!r}: expected one of {', '.join(METHODS)}")
    if not tol > 0:
        raise ConfigError(f"svd_tolerance {tol}: expected a number > 0, as a share of the largest sigma")
    check_request(weight, k, name)
    with full_precision(weight.device):
        matrix, scale = _prepare(weight, name)
        try:
            sketch = (oversampling, power_iterations)
            factors = _factor(matrix, k, tol, method, sketch, seed, is_zero=scale == 0)
        except torch.linalg.LinAlgError as error:
            raise FactorError(f"layer {name}: LAPACK could not decompose the weight ({error})") from error
    if method != "randomized" and not factors.residual <= tol:
        raise FactorError(
            f"layer {name}: the {factors.method} decomposition reached a residual of {factors.residual:.1e}, "
            f"expected at most svd_tolerance {tol:.1e} (of the largest singular value); raise svd_tolerance"
        )
    sigma = factors.sigma * scale
    if not math.isfinite(sigma[0].item()):
        raise FactorError(f"layer {name}: the largest singular value overflows float32; rescale the weight")
    fingerprint = fingerprint or weight_fingerprint(weight)
    return dataclasses.replace(factors, sigma=sigma, fingerprint=fingerprint)


def check_request(weight: Tensor, k: int, name: str) -> None:
    """Refuse what cannot be factored.

    Raises:
        FactorError: the weight is no matrix of floating-point values, or k is not in 1…min(m, n).
    """
    if weight.dim() != 2 or weight.numel() == 0:
        raise FactorError(f"layer {name}: expected a matrix (out, in), got shape {tuple(weight.shape)}")
    if not weight.is_floating_point():
        raise FactorError(
            f"layer {name}: dtype {weight.dtype} holds packed or integer values; dequantise the weight first"
        )
    if weight.is_meta:
        raise FactorError(f"layer {name}: the weight is on the meta device and has no values; load it first")
    if k < 1:
        raise FactorError(f"layer {name}: principal_rank {k} is below 1; raise it or leave the layer out")
    if k > min(weight.shape):
        raise FactorError(
            f"layer {name}: principal_rank {k} exceeds min(out, in) = {min(weight.shape)}; "
            "lower it or set principal_rank_pattern"
        )


def _prepare(weight: Tensor, name: str) -> tuple[Tensor, float]:
    """Return the weight as a contiguous fp32 matrix of safe magnitude, and the power of two taken out.

    It is 0 for an all-zero weight.
    """
    matrix = weight.detach().to(torch.float32).contiguous()
    low, high = torch.aminmax(matrix)
    largest = max(-low.item(), high.item())
    if not math.isfinite(largest):
        bad = int((~torch.isfinite(matrix)).sum())
        raise FactorError(
            f"layer {name}: {bad} of {matrix.numel()} values are NaN or Inf in float32; "
            "the checkpoint is damaged or out of range"
        )
    if largest == 0 or _SAFE_MAGNITUDE[0] < largest < _SAFE_MAGNITUDE[1]:
        return matrix, float(largest > 0)
    scale = 2.0 ** (math.frexp(largest)[1] - 1)
    return (matrix.to(widest(matrix.device)) / scale).float(), scale


def _factor(
    matrix: Tensor, k: int, tol: float, method: str, sketch: tuple[int, int], seed: int, is_zero: bool
) -> SpectralFactors:
    """Decompose, certify, and take the next more accurate way while the method allows it."""
    generator = torch.Generator("cpu").manual_seed(seed)
    if is_zero:
        return certify(matrix, _axes(matrix, k), "exact")
    if method == "randomized":
        return certify(matrix, _randomized(matrix, k, *sketch, generator), method)
    if not _is_exact_cheaper(matrix, k, tol, method):
        factors = certify(matrix, block_krylov(matrix, k, tol, generator), "krylov")
        if factors.residual <= tol or method == "krylov":
            return factors
    factors = certify(matrix, gram_svd(matrix, k), "exact")
    return factors if factors.residual <= tol else certify(matrix, full_svd(matrix, k), "exact")


def _is_exact_cheaper(matrix: Tensor, k: int, tol: float, method: str) -> bool:
    size = min(matrix.shape)
    if method == "exact" or size <= MAX_BLOCKS * block_size(k):
        return True
    return method == "auto" and (size <= max(_EXACT_SIZE, _EXACT_SIZE_PER_RANK * k) or tol < _KRYLOV_FLOOR)


def _randomized(
    matrix: Tensor, k: int, oversampling: int, iterations: int, generator: torch.Generator
) -> Triplets:
    """The paper's range finder: a random block of k + oversampling columns and a few power iterations."""
    width = min(k + oversampling, *matrix.shape)
    probe = torch.randn(matrix.shape[1], width, generator=generator, device="cpu").to(matrix.device)
    Q = torch.linalg.qr(matrix @ probe).Q
    for _ in range(iterations):
        Q = torch.linalg.qr(matrix.T @ Q).Q
        Q = torch.linalg.qr(matrix @ Q).Q
    P, sigma, Vt = torch.linalg.svd(Q.T @ matrix, full_matrices=False)
    return Triplets(Q @ P[:, :k], sigma[:k], Vt[:k].T)


def _axes(matrix: Tensor, k: int) -> Triplets:
    """Any orthonormal vectors do for an all-zero weight: take coordinate axes."""
    m, n = matrix.shape
    return Triplets(
        *(torch.eye(m, k, device="cpu"), torch.zeros(k, device="cpu"), torch.eye(n, k, device="cpu"))
    )


def certify(matrix: Tensor, triplets: Triplets, method: str) -> SpectralFactors:
    """Fix the signs, round to fp32, and measure the residual and orthogonality of the rounded tensors."""
    U, sigma, V = (tensor.to(matrix.device) for tensor in triplets)
    peaks = U.gather(0, U.abs().argmax(0, keepdim=True)).squeeze(0)
    signs = torch.where(peaks < 0, -1.0, 1.0).to(U)
    rounded = (tensor.to(torch.float32).contiguous() for tensor in (U * signs, sigma, V * signs))
    U, sigma, V = rounded
    orthogonality = max(_orthogonality(U), _orthogonality(V))
    return SpectralFactors(U, sigma, V, _residual(matrix, U, sigma, V), orthogonality, method)


def _residual(matrix: Tensor, U: Tensor, sigma: Tensor, V: Tensor) -> float:
    """The certificate, in one pass over the weight, a float64 copy of some rows at a time."""
    if sigma[0] == 0:
        return 0.0
    U, sigma, V = (tensor.to(widest(matrix.device)) for tensor in (U, sigma, V))
    forward, image = torch.zeros_like(sigma), torch.zeros_like(V)
    start = 0
    for rows in row_chunks(matrix):
        wide, U_rows = rows.to(U.dtype), U[start : start + rows.shape[0]]
        forward += (wide @ V - sigma * U_rows).square().sum(0)
        image.addmm_(wide.T, U_rows)
        start += rows.shape[0]
    backward = (image - sigma * V).square().sum(0)
    return (torch.maximum(forward, backward).max().sqrt() / sigma[0]).item()


def _orthogonality(basis: Tensor) -> float:
    wide = basis.to(widest(basis.device))
    identity = torch.eye(basis.shape[1], dtype=wide.dtype, device=wide.device)
    return (wide.T @ wide - identity).abs().max().item()
