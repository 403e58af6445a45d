"""How the energy of an update lies on the spectrum of the weight that it changes."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


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
