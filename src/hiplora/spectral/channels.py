"""The two channels of an update, the retraction that keeps them apart (Eq. 1-5), and where an update's energy lies."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hiplora.spectral.factors import full_precision

SIDES = ("both", "input", "output")


def protected(
    U: Float[Tensor, "m k"], V: Float[Tensor, "n k"], sides: str
) -> tuple[Float[Tensor, "m p"], Float[Tensor, "n q"]]:
    """Return the parts of U and V that the residual channel must keep out of; a free side has no column."""
    return U if sides != "input" else U[:, :0], V if sides != "output" else V[:, :0]


def retract(
    A: Float[Tensor, "r n"], B: Float[Tensor, "m r"], U: Float[Tensor, "m p"], V: Float[Tensor, "n q"]
) -> tuple[Float[Tensor, "r n"], Float[Tensor, "m r"]]:
    """Project LoRA factors onto the complement of the protected subspaces: `(Ã, B̃)` of Eq. 4.

    A side whose basis has no column is left free (`protected`), one whose basis is complete leaves exactly nothing.
    Returns new tensors; nothing is written in place. Costs 4(mp + nq)r flops and forms no dense projector.
    """
    kept_A = A - (A @ V) @ V.T if V.shape[1] < V.shape[0] else torch.zeros_like(A)
    kept_B = B - U @ (U.T @ B) if U.shape[1] < U.shape[0] else torch.zeros_like(B)
    return kept_A, kept_B


def soften(
    A: Float[Tensor, "r n"],
    B: Float[Tensor, "m r"],
    U: Float[Tensor, "m k"],
    V: Float[Tensor, "n k"],
    shrink_U: Float[Tensor, "k k"] | None,
    shrink_V: Float[Tensor, "k k"] | None,
) -> tuple[Float[Tensor, "r n"], Float[Tensor, "m r"]]:
    """Return LoRA factors through the soft projection: `A (I − V S_V Vᵀ)` and `(I − U S_U Uᵀ) B`.

    With `S = Qᵀ diag(λ_i/(λ_i + λ_k)) Q` this is the fixed filter `(I + C/λ_k)⁻¹` on the k leading directions of C:
    next to nothing of the strongest passes, half of the k-th. `S = I` is the hard projection (`retract`); a side
    without one is left free. Differentiable.
    """
    if shrink_V is not None:
        A = A - ((A @ V) @ shrink_V) @ V.T
    if shrink_U is not None:
        B = B - U @ (shrink_U @ (U.T @ B))
    return A, B


def leak(A: Float[Tensor, "r n"], B: Float[Tensor, "m r"], U: Float[Tensor, "m p"], V: Float[Tensor, "n q"]) -> float:
    """Return `max(‖UᵀB‖/‖B‖, ‖AV‖/‖A‖)`: how far the factors are from the complement, 0 (inside) to 1.

    Frobenius norms; an all-zero factor leaks nothing; NaN and Inf leak infinitely, so that no check of the
    kind `leak > tolerance` lets them pass.
    """
    with full_precision(A.device):
        return max(_ratio(U.T @ B, B), _ratio(A @ V, A))


def fused_factors(
    A: Float[Tensor, "r n"],
    B: Float[Tensor, "m r"],
    delta: Float[Tensor, " k"],
    U: Float[Tensor, "m k"],
    V: Float[Tensor, "n k"],
    scaling: float,
) -> tuple[Float[Tensor, "q n"], Float[Tensor, "m q"]]:
    """Write both channels as one pair of thin factors of rank `q = r + k`, losslessly.

    `A' = [A; Vᵀ]` and `B' = [s·B | U diag(δ)]`, so that `B'A'` is the update of Eq. 1 with scaling 1.
    """
    return torch.cat([A, V.T]), torch.cat([scaling * B, U * delta], dim=1)


@dataclass(frozen=True, eq=False)
class Allocation:
    """Where the energy `‖Δ‖_F²` of an update lies; the fractions are in [0, 1], and 0 for a zero update.

    `left` is the share whose output is in span(U), `right` the share that reads span(V), `both` the share
    that does both; hence `1 - left - right + both` lies wholly in the complement. `gains` is
    `diag(UᵀΔV)`, the change of each protected gain, float64.
    """

    left: float
    right: float
    both: float
    norm: float
    gains: Float[Tensor, " k"]


def allocate(
    P: Float[Tensor, "m q"], Q: Float[Tensor, "q n"], U: Float[Tensor, "m k"], V: Float[Tensor, "n k"]
) -> Allocation:
    """Measure the update `Δ = PQ` against orthonormal bases `U`, `V`, in factor space, in float64.

    Δ is never formed: the norms come from the triangular factors of `P` and `Qᵀ`, which (unlike products
    of Gram matrices) stay accurate when the columns of `P` nearly cancel.
    """
    P, Q, U, V = (tensor.detach().double() for tensor in (P, Q, U, V))
    R_P = torch.linalg.qr(P, mode="r").R
    R_Q = torch.linalg.qr(Q.T, mode="r").R
    UP, QV = U.T @ P, Q @ V
    norm = _norm(R_P @ R_Q.T)
    parts = (UP @ R_Q.T, R_P @ QV, UP @ QV)
    left, right, both = (min(1.0, (_norm(part) / norm) ** 2) if norm else 0.0 for part in parts)
    return Allocation(left, right, both, norm, (UP * QV.T).sum(dim=1))


def _norm(matrix: Tensor) -> float:
    return torch.linalg.vector_norm(matrix).item()


def _ratio(part: Tensor, whole: Tensor) -> float:
    dtype = torch.promote_types(whole.dtype, torch.float32)  # half-precision norms overflow
    norm = torch.linalg.vector_norm(whole, dtype=dtype).item()
    if norm == 0:
        return 0.0
    ratio = torch.linalg.vector_norm(part, dtype=dtype).item() / norm
    return ratio if math.isfinite(ratio) else math.inf
