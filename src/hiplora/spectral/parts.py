"""Parts of a weight that an adapter can start from: factors B, A whose product is the part."""

import torch
from jaxtyping import Float
from torch import Tensor

from hiplora.spectral.precision import full_precision


def minor_part(weight: Float[Tensor, "m n"], r: int) -> tuple[Float[Tensor, "m {r}"], Float[Tensor, "{r} n"]]:
    """Return B, A with BA = Σ σᵢuᵢvᵢᵀ over the r smallest singular values; r is at most min(m, n).

    Each factor takes √σ of every direction, and they come by descending σ. In fp32: the part is right to rounding of
    the largest singular value. MiLoRA's start (Wang et al. 2025, arXiv 2406.09044).
    """
    with full_precision(weight.device):
        U, sigma, Vt = torch.linalg.svd(weight.float(), full_matrices=False)
        root = sigma[-r:].sqrt()
        return U[:, -r:] * root, root[:, None] * Vt[-r:]


def restricted_part(
    weight: Float[Tensor, "m n"], directions: Float[Tensor, "n r"]
) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"]]:
    """Return B, A with BA = W N Nᵀ, what a weight does to the span of orthonormal input directions N; r ≤ m.

    The factors are those of the product's SVD, √σ to each. LoRA-Null's start (Tang et al. 2025, arXiv 2503.02659).
    """
    with full_precision(weight.device):
        N = directions.to(weight.device, torch.float32)
        U, sigma, Rt = torch.linalg.svd(weight.float() @ N, full_matrices=False)
        root = sigma.sqrt()
        return U * root, root[:, None] * (Rt @ N.T)
