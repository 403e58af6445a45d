"""The update of one weight: the null space of the keys to preserve, and the least change in it that stores new values.

Keys are what goes into a weight W (m, n), values what comes out, one a column.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from hiplora.errors import FactorError
from hiplora.spectral import MomentBasis


def null_space(basis: MomentBasis, threshold: float, name: str = "layer") -> Float[Tensor, "n n"]:
    """Return P, the projector on the directions in which `E[kkᵀ]` of the keys to preserve is below a threshold.

    Args:
        basis: eigenvalues, descending, and eigenvectors of the second moment of the keys.
        threshold: eigenvalues below it count as none; an absolute value, as the authors' (0.02).
        name: of the layer, for messages.

    Raises:
        FactorError: no direction is below the threshold, or so many are not that their eigenvectors were not kept.

    Source: AlphaEdit, Sect. 3.1.
    """
    n, held = basis.vectors.shape
    above = int((basis.values >= threshold).sum())
    if above >= n or above > held:
        raise FactorError(
            f"layer {name}: {above} of {n} directions of its inputs are above the threshold {threshold}, at most "
            f"{min(n - 1, held)} can be; raise threshold (the mean over the directions is {basis.values.mean():.2g})"
        )
    V = basis.vectors[:, :above].double()
    return torch.eye(n, dtype=torch.float64) - V @ V.T


def null_space_update(
    keys: Float[Tensor, "n e"],
    residual: Float[Tensor, "m e"],
    P: Float[Tensor, "n n"],
    former: Float[Tensor, "n n"] | None = None,
    ridge: float = 1.0,
) -> Float[Tensor, "m n"]:
    """Return `Δ = R K₁ᵀ P (Kₚ Kₚᵀ P + K₁ K₁ᵀ P + ridge I)⁻¹`, in float64.

    Δ is the change that brings the values of the keys K₁ nearest to their targets (R is what is missing), stays
    small, moves the keys of former edits little, and leaves every key x with P x = 0 exactly where it was.

    Args:
        keys: K₁, of the new edits.
        residual: R, target values less current ones.
        P: the projector from `null_space`.
        former: Kₚ Kₚᵀ, of the edits made before; None is none.
        ridge: weight of ‖Δ‖²; AlphaEdit's formula has 1.

    Source: AlphaEdit, Eq. 14.
    """
    K, R = keys.double(), residual.double()
    moment = K @ K.T if former is None else K @ K.T + former.double()
    system = P @ moment + ridge * torch.eye(len(P), dtype=torch.float64, device=P.device)
    return torch.linalg.solve(system, P @ K @ R.T).T
