"""The two channels of an update, the retraction and the budget on them (Eq. 1-9), and where an update's energy lies."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hiplora.errors import ConfigError
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
    Nothing is written in place. Costs 4(mp + nq)r flops.
    """
    projected_A = A - (A @ V) @ V.T if V.shape[1] < V.shape[0] else torch.zeros_like(A)
    projected_B = B - U @ (U.T @ B) if U.shape[1] < U.shape[0] else torch.zeros_like(B)
    return projected_A, projected_B


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
    next to nothing of the strongest passes, half of the k-th. A side without S is left free. Differentiable.
    """
    if shrink_V is not None:
        A = A - ((A @ V) @ shrink_V) @ V.T
    if shrink_U is not None:
        B = B - U @ (shrink_U @ (U.T @ B))
    return A, B


def leak(A: Float[Tensor, "r n"], B: Float[Tensor, "m r"], U: Float[Tensor, "m p"], V: Float[Tensor, "n q"]) -> float:
    """Return `max(‖UᵀB‖/‖B‖, ‖AV‖/‖A‖)`: how far the factors are from the complement, 0 (inside) to 1.

    An all-zero factor leaks nothing; NaN and Inf leak infinitely, so that `leak > tolerance` never lets them pass.
    """
    with full_precision(A.device):
        return max(_ratio(U.T @ B, B), _ratio(A @ V, A))


def _ratio(part: Tensor, whole: Tensor) -> float:
    dtype = torch.promote_types(whole.dtype, torch.float32)  # half-precision norms overflow
    norm = torch.linalg.vector_norm(whole, dtype=dtype).item()
    ratio = torch.linalg.vector_norm(part, dtype=dtype).item() / norm if norm else 0.0
    return ratio if math.isfinite(ratio) else math.inf


def fused_factors(
    A: Float[Tensor, "r n"],
    B: Float[Tensor, "m r"],
    delta: Float[Tensor, " k"],
    U: Float[Tensor, "m k"],
    V: Float[Tensor, "n k"],
    scaling: float,
) -> tuple[Float[Tensor, "q n"], Float[Tensor, "m q"]]:
    """Write both channels as one pair of factors of rank `q = r + k`: `A' = [A; Vᵀ]` and `B' = [s·B | U diag(δ)]`."""
    return torch.cat([A, V.T]), torch.cat([scaling * B, U * delta], dim=1)


def budget_weights(sigma: Float[Tensor, " k"], gamma: float) -> Float[Tensor, " k"]:
    """Return `w_i = σ_i^γ / Σ_j σ_j^γ` (Eq. 6); they sum to one.

    `γ = 0` and an all-zero spectrum give `1/k`. A γ that is negative or not finite is a ConfigError.
    """
    if not math.isfinite(gamma) or gamma < 0:
        raise ConfigError(f"stability_gamma {gamma}: expected a finite number >= 0 (0: all alike)")
    top = sigma.max()
    if gamma == 0 or top <= 0:
        return torch.full_like(sigma, 1 / len(sigma))
    powers = (sigma.double() / top.double()).clamp_min(0) ** gamma  # of shares, so that no γ overflows
    return (powers / powers.sum()).to(sigma.dtype)


def penalty(delta: Float[Tensor, " k"], weights: Float[Tensor, " k"]) -> Float[Tensor, ""]:
    """Return `R(δ) = Σ_i w_i δ_i²` (Eq. 9) as a differentiable scalar, without λ."""
    return (weights * delta * delta).sum()


def penalty_gradient(delta: Float[Tensor, " k"], weights: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """Return `∂R/∂δ = 2wδ`, the budget's share of the gradient of Eq. 7 without λ."""
    return 2 * weights * delta


def proximal_step(delta: Float[Tensor, " k"], weights: Float[Tensor, " k"], step: float) -> Float[Tensor, " k"]:
    """Return `argmin_x ½‖x − δ‖² + step·R(x) = δ / (1 + 2·step·w)`: the budget applied after a step.

    `step` is the learning rate times λ; one that is negative or not finite is a ConfigError.
    """
    if not math.isfinite(step) or step < 0:
        raise ConfigError(f"proximal step {step}: expected a finite number >= 0")
    return delta / (1 + 2 * step * weights)


@dataclass(frozen=True, eq=False)
class Allocation:
    """Where the energy `‖Δ‖_F²` of an update lies; the fractions are in [0, 1], and 0 for a zero update.

    `left` is the share whose output is in span(U), `right` the share that reads span(V), `both` that of both. `gains`
    is `diag(UᵀΔV)`, the change of each protected gain, float64.
    """

    left: float
    right: float
    both: float
    norm: float
    gains: Float[Tensor, " k"]


def allocate(
    P: Float[Tensor, "m q"], Q: Float[Tensor, "q n"], U: Float[Tensor, "m k"], V: Float[Tensor, "n k"]
) -> Allocation:
    """Measure the update `Δ = PQ` against orthonormal bases U, V in factor space, in float64, without forming Δ."""
    P, Q, U, V = (tensor.detach().double() for tensor in (P, Q, U, V))
    R_P = torch.linalg.qr(P, mode="r").R
    R_Q = torch.linalg.qr(Q.T, mode="r").R
    UP, QV = U.T @ P, Q @ V
    parts = (R_P @ R_Q.T, UP @ R_Q.T, R_P @ QV, UP @ QV)
    norm, *inside = (torch.linalg.vector_norm(part).item() for part in parts)
    left, right, both = (min(1.0, (part / norm) ** 2) if norm else 0.0 for part in inside)
    return Allocation(left, right, both, norm, (UP * QV.T).sum(dim=1))
