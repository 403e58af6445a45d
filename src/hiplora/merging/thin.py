"""The singular value decomposition of an update in the space of its thin factors: nothing (m, n) is ever formed.

Pure functions, in float64.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hiplora.adapters import Pair

# Singular values below this share of the largest are what rounding to fp32 leaves of directions that are not there.
_ROUNDING = 1e-6
# The same for sums whose terms cancel, in units of the norms of their factors: what float64 leaves.
_CANCELLED = 1e-13
# Unit vectors that differ by less than this are one direction: its singular values among them are 0 but for rounding.
_SAME_DIRECTION = 1e-5


def thin_svd(factors: Pair) -> tuple[Float[Tensor, "m q"], Float[Tensor, " q"], Float[Tensor, "n q"]]:
    """Return `(U, σ, V)` with `B'A' = U diag(σ) Vᵀ`, σ descending and above rounding; q = 0 for a zero update.

    From QR of both factors and the SVD of the small matrix between them.
    """
    A, B = factors
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().T)
    P, sigma, Ot = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    floor = torch.maximum(_ROUNDING * sigma[0], _CANCELLED * R_B.norm() * R_A.norm())
    rank = int((sigma > floor).sum())
    return Q_B @ P[:, :rank], sigma[:rank], Q_A @ Ot[:rank].T


def shared_outputs(factors: Sequence[Pair]) -> Float[Tensor, "m q"]:
    """Return U of `[ΔW_1 … ΔW_T] = U Σ Vᵀ`, the updates side by side; q is at most the sum of their ranks.

    U depends on the `A_t` only through their triangular factors: with `A_t = S_tᵀ Q_tᵀ` it is that of
    `[B_1 … B_T] diag(S_1ᵀ, …, S_Tᵀ)`, blocks on the diagonal.
    """
    inner = [torch.linalg.qr(A.double().T, mode="r").R.T for A, _ in factors]
    return thin_svd((torch.block_diag(*inner), torch.cat([B for _, B in factors], dim=1)))[0]


def polar(columns: Float[Tensor, "m q"]) -> Float[Tensor, "m q"]:
    """Return the orthogonal polar factor: `P Oᵀ` of the columns' SVD `P S Oᵀ`, the nearest orthonormal columns.

    For linearly dependent columns it is a partial isometry on their span, whatever their order.
    """
    P, sigma, Ot = torch.linalg.svd(columns, full_matrices=False)
    spanned = sigma > _SAME_DIRECTION
    return P[:, spanned] @ Ot[spanned]
