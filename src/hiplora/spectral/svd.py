"""Certified truncated SVD: every set of factors is measured against its weight before anyone may use it."""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from hiplora.errors import ConfigError, FactorError, FactorSettingError
from hiplora.spectral.factors import (
    SpectralFactors,
    Triplets,
    check_values,
    full_precision,
    row_chunks,
    weight_fingerprint,
    widest,
)
from hiplora.spectral.krylov import MAX_BLOCKS, block_krylov, block_size

METHODS = ("auto", "exact", "krylov")

# Measured on two cores (benchmarks/svd.py): an eigenproblem of this size takes about as long as the iteration.
_EXACT_SIZE = 640
_EXACT_SIZE_PER_RANK = 14
_KRYLOV_FLOOR = 5e-6  # fp32 products cannot promise less


def truncated_svd(
    weight: Tensor,
    k: int,
    tol: float = 1e-4,
    method: str = "auto",
    *,
    name: str = "weight",
    fingerprint: str | None = None,
) -> SpectralFactors:
    """Factor a weight (m, n) into its k leading singular triplets, with a certificate.

    `method="exact"` decomposes densely in float64. `"krylov"` only multiplies by W and Wᵀ until the residual is below
    `tol` (weights too small for its basis are decomposed exactly). `"auto"` takes the cheaper of the two, and the
    exact one where the iteration missed the tolerance. Equal fp32 values give equal factors; in each u the entry of
    largest magnitude is positive. `fingerprint` saves hashing a weight whose fingerprint is known.

    Raises:
        FactorError: not a finite floating matrix, k outside 1 … min(m, n), or the tolerance was missed.
        ConfigError: unknown method, or a tolerance that is not positive.
    """
    if method not in METHODS:
        raise ConfigError(f"method {method!r}: expected one of {', '.join(METHODS)}")
    if not tol > 0:
        raise ConfigError(f"svd_tolerance {tol}: expected a number > 0, as a share of the largest sigma")
    matrix = as_matrix(weight, k, name)
    with full_precision(weight.device):
        try:
            factors = _decompose(matrix, k, tol, method, torch.Generator("cpu").manual_seed(0))
        except torch.linalg.LinAlgError as error:
            raise FactorError(f"layer {name}: LAPACK could not decompose the weight ({error})") from error
    if not factors.residual <= tol:
        raise FactorSettingError(
            f"layer {name}: the {factors.method} decomposition reached a residual of {factors.residual:.1e}, "
            f"expected at most svd_tolerance {tol:.1e} (of the largest singular value); raise svd_tolerance"
        )
    return dataclasses.replace(factors, fingerprint=fingerprint or weight_fingerprint(weight))


def as_matrix(weight: Tensor, k: int, name: str) -> Float[Tensor, "m n"]:
    """Return a weight as a contiguous fp32 matrix of which k directions can be taken, or raise FactorError."""
    if weight.dim() != 2 or weight.numel() == 0:
        raise FactorError(f"layer {name}: expected a matrix (out, in), got shape {tuple(weight.shape)}")
    if not weight.is_floating_point():
        raise FactorError(
            f"layer {name}: dtype {weight.dtype} holds packed or integer values; dequantise the weight first"
        )
    check_values(weight, name)
    if k < 1:
        raise FactorSettingError(f"layer {name}: principal_rank {k} is below 1; raise it or leave the layer out")
    if k > min(weight.shape):
        raise FactorSettingError(
            f"layer {name}: principal_rank {k} exceeds min(out, in) = {min(weight.shape)}; "
            "lower it or set principal_rank_pattern"
        )
    matrix = weight.detach().to(torch.float32).contiguous()
    if not torch.isfinite(matrix).all():
        raise FactorError(
            f"layer {name}: the weight has NaN or Inf in float32; the checkpoint is damaged or out of range"
        )
    return matrix


def certify(matrix: Tensor, triplets: Triplets, method: str) -> SpectralFactors:
    """Fix the signs, round to fp32, and measure the residual and orthogonality of the rounded tensors."""
    U, sigma, V = (tensor.to(matrix.device) for tensor in triplets)
    peaks = U.gather(0, U.abs().argmax(0, keepdim=True)).squeeze(0)
    signs = torch.where(peaks < 0, -1.0, 1.0).to(U)
    U, sigma, V = (tensor.to(torch.float32).contiguous() for tensor in (U * signs, sigma, V * signs))
    orthogonality = max(_orthogonality(U), _orthogonality(V))
    return SpectralFactors(U, sigma, V, _residual(matrix, U, sigma, V), orthogonality, method)


def factor_mismatch(
    weight: Float[Tensor, "m n"],
    U: Float[Tensor, "m k"],
    sigma: Float[Tensor, " k"],
    V: Float[Tensor, "n k"],
    basis: str = "weight",
) -> float:
    """Return how far factors are from being a weight's, in units of σ_1: about 0 for its own, about 1 for another's."""
    if basis == "weight":
        mismatch = torch.maximum((weight @ V - U * sigma).norm(dim=0), (weight.T @ U - V * sigma).norm(dim=0))
    else:
        mismatch = (U.T @ weight @ V - sigma.diag()).norm(dim=0)  # the activation basis only makes UᵀWV diagonal
    return (mismatch.max() / sigma[0]).item() if sigma[0] > 0 else mismatch.max().item()


def minor_svd_factors(weight: Float[Tensor, "m n"], r: int) -> tuple[Float[Tensor, "m {r}"], Float[Tensor, "{r} n"]]:
    """Return B, A with BA = Σ σᵢuᵢvᵢᵀ over the r smallest singular values, √σ to each, fp32 (MiLoRA, 2406.09044)."""
    with full_precision(weight.device):
        U, sigma, Vt = torch.linalg.svd(weight.float(), full_matrices=False)
        root = sigma[-r:].sqrt()
        return U[:, -r:] * root, root[:, None] * Vt[-r:]


def projected_factors(
    weight: Float[Tensor, "m n"], directions: Float[Tensor, "n r"]
) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"]]:
    """Return B, A with BA = W N Nᵀ for orthonormal inputs N (n, r), √σ to each; r ≤ m (LoRA-Null, 2503.02659)."""
    with full_precision(weight.device):
        N = directions.to(weight.device, torch.float32)
        U, sigma, Rt = torch.linalg.svd(weight.float() @ N, full_matrices=False)
        root = sigma.sqrt()
        return U * root, root[:, None] * (Rt @ N.T)


def gram_svd(weight: Tensor, k: int) -> Triplets:
    """Return the leading triplets from the smaller Gram matrix, in float64; squaring loses σ_i below 1e-8 σ_1."""
    if weight.shape[0] < weight.shape[1]:
        V, sigma, U = gram_svd(weight.T, k)
        return Triplets(U, sigma, V)
    gram = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)
    for rows in row_chunks(weight):
        upcast = rows.double()
        gram.addmm_(upcast.T, upcast)
    V = torch.linalg.eigh(gram).eigenvectors[:, -k:].flip(1)
    # The columns of WV are orthogonal up to rounding; QR also completes the ones that are zero.
    U, triangle = torch.linalg.qr(torch.cat([rows.double() @ V for rows in row_chunks(weight)]))
    diagonal = triangle.diagonal()
    sigma, order = diagonal.abs().sort(descending=True)
    return Triplets((U * torch.where(diagonal < 0, -1.0, 1.0).to(U))[:, order], sigma, V[:, order])


def _decompose(matrix: Tensor, k: int, tol: float, method: str, generator: torch.Generator) -> SpectralFactors:
    """Decompose and certify; go on to the next more accurate method while the tolerance is missed."""
    if not matrix.any():  # any orthonormal vectors do for an all-zero weight: take coordinate axes
        axes = (torch.eye(size, k, device=matrix.device) for size in matrix.shape)
        return certify(matrix, Triplets(next(axes), matrix.new_zeros(k), next(axes)), "exact")
    size = min(matrix.shape)
    exact = method == "exact" or size <= MAX_BLOCKS * block_size(k)
    if method == "auto":
        exact = exact or size <= max(_EXACT_SIZE, _EXACT_SIZE_PER_RANK * k) or tol < _KRYLOV_FLOOR
    if not exact:
        factors = certify(matrix, block_krylov(matrix, k, tol, generator), "krylov")
        if factors.residual <= tol or method == "krylov":
            return factors
    factors = certify(matrix, gram_svd(matrix, k), "exact")
    if not factors.residual <= tol:  # LAPACK's full SVD in float64: slow, and accurate whatever the spectrum
        U, sigma, Vt = torch.linalg.svd(matrix.double(), full_matrices=False)
        factors = certify(matrix, Triplets(U[:, :k], sigma[:k], Vt[:k].T), "exact")
    return factors


def _residual(matrix: Tensor, U: Tensor, sigma: Tensor, V: Tensor) -> float:
    """Return the certificate, in one pass over the weight, with a float64 copy of some rows at a time."""
    if sigma[0] == 0:
        return 0.0
    U, sigma, V = (tensor.to(widest(matrix.device)) for tensor in (U, sigma, V))
    forward, image = torch.zeros_like(sigma), torch.zeros_like(V)
    start = 0
    for rows in row_chunks(matrix):
        upcast, U_rows = rows.to(U.dtype), U[start : start + rows.shape[0]]
        forward += (upcast @ V - sigma * U_rows).square().sum(0)
        image.addmm_(upcast.T, U_rows)
        start += rows.shape[0]
    backward = (image - sigma * V).square().sum(0)
    return (torch.maximum(forward, backward).max().sqrt() / sigma[0]).item()


def _orthogonality(basis: Tensor) -> float:
    upcast = basis.to(widest(basis.device))
    identity = torch.eye(basis.shape[1], dtype=upcast.dtype, device=upcast.device)
    return (upcast.T @ upcast - identity).abs().max().item()
