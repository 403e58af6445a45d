"""How updates lie to each other: norms, angles between their subspaces, entries of opposite sign.

Pure functions of thin factors `(A, B)` with `ΔW = BA`. All but the signs stay in factor space, in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hiplora.adapters import Pair

# A direction with less than this share of the largest singular value is not counted: a millionth of its energy.
RANK_TOLERANCE = 1e-3
# An update this far below its factors is what rounding left of terms that cancel: zero, as with B = 0.
_ROUNDING = torch.finfo(torch.float32).eps
_CHUNK = 1 << 18  # entries of a dense update that are held at a time


@dataclass(frozen=True, eq=False)
class Spaces:
    """What an update writes and reads: orthonormal bases of its column space (outputs) and row space (inputs).

    Both have as many columns as the numerical rank: the singular values above `RANK_TOLERANCE` of the largest. `norm`
    is ‖ΔW‖_F. float64; a zero update has rank 0.
    """

    outputs: Float[Tensor, "m r"]
    inputs: Float[Tensor, "n r"]
    norm: float

    @property
    def rank(self) -> int:
        """The numerical rank r."""
        return self.outputs.shape[1]


@dataclass(frozen=True)
class Overlap:
    """How much two subspaces of dimensions p and q share, in a space of n dimensions.

    `mean` is the mean squared cosine of their principal angles, `Σ_i cos²θ_i / min(p, q)` (the angles: Björck and
    Golub 1973; the mean: LoRA's subspace similarity, Hu et al. 2021, Eq. 4): 0 where they are orthogonal, 1 where the
    smaller one lies in the other. `largest_cosine` is that of the smallest angle. `chance` is the mean that random
    subspaces have: `max(p, q) / n`.
    """

    mean: float
    largest_cosine: float
    chance: float


def compress(factors: Sequence[Pair]) -> list[Pair]:
    """Return the updates in coordinates of what they span together: small factors with the same geometry, float64.

    `ΔW_t = Q_L (B'_t A'_t) Q_Rᵀ` with orthonormal `Q_L`, `Q_R` that are never formed: `B'_t` and `A'_tᵀ` are blocks of
    the triangular factors of all `B_t` side by side and all `A_tᵀ` side by side. Norms, inner products, singular values
    and principal angles of the small updates are those of the updates; their size is the sum of the ranks at most.
    """
    ranks = [A.shape[0] for A, _ in factors]
    left = torch.linalg.qr(torch.cat([B for _, B in factors], dim=1).double(), mode="r").R
    right = torch.linalg.qr(torch.cat([A for A, _ in factors]).double().T, mode="r").R
    return [(R.T, L) for L, R in zip(left.split(ranks, dim=1), right.split(ranks, dim=1), strict=True)]


def spaces(factors: Pair) -> Spaces:
    """Return what an update writes and reads, from thin orthogonal factors and a small SVD."""
    A, B = factors
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().T)
    P, sigma, Ot = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    sigma = sigma * (sigma[:1] > _ROUNDING * R_B.norm() * R_A.norm())
    rank = int((sigma > RANK_TOLERANCE * sigma[:1]).sum())
    return Spaces(Q_B @ P[:, :rank], Q_A @ Ot[:rank].T, sigma.norm().item())


def overlap(P: Float[Tensor, "s p"], Q: Float[Tensor, "s q"], dimensions: int) -> Overlap | None:
    """Return how much the spans of two orthonormal bases share, or None where one of them is empty.

    `dimensions` is n; the s rows are fewer where the bases are in coordinates of a part of the space.
    """
    if not P.shape[1] or not Q.shape[1]:
        return None
    cosines = torch.linalg.svdvals(P.T @ Q).clamp_max(1.0)
    larger = max(P.shape[1], Q.shape[1])
    return Overlap(cosines.square().mean().item(), cosines[0].item(), larger / dimensions)


def inner_product(one: Pair, other: Pair) -> float:
    """Return `⟨ΔW_a, ΔW_b⟩ = tr(ΔW_aᵀ ΔW_b)`."""
    (A, B), (A_other, B_other) = one, other
    return ((B.T @ B_other) * (A @ A_other.T)).sum().item()


def norm_of_sum(factors: Sequence[Pair]) -> float:
    """Return `‖Σ_t ΔW_t‖_F`; for compressed factors, as it forms the sum."""
    return (torch.cat([B for _, B in factors], dim=1) @ torch.cat([A for A, _ in factors])).norm().item()


def cancelled(factors: Sequence[Pair]) -> tuple[float, float]:
    """Return how much magnitude cancels in the sum, entry by entry, and how much there is before it.

    These are `Σ_t ‖ΔW_t‖₁ − ‖Σ_t ΔW_t‖₁` and `Σ_t ‖ΔW_t‖₁`. An entry with the magnitude P of one sign and N of the
    other loses `2 min(P, N)`: twice what opposes the sign that TIES-Merging would elect there (Yadav et al. 2023).

    Exact, of entries in fp32. A few rows of the dense updates are formed at a time, one update after the other: three
    buffers of 2¹⁸ entries (1 MiB each), or of one row where that is longer, however many updates and rows there are.
    """
    rows = max(1, _CHUNK // factors[0][0].shape[1])
    before = after = 0.0
    for start in range(0, factors[0][1].shape[0], rows):
        total = torch.zeros(())
        for A, B in factors:
            part = B[start : start + rows] @ A
            total = total + part
            before += part.abs_().sum(dtype=torch.float64).item()
        after += total.abs_().sum(dtype=torch.float64).item()
    return max(0.0, before - after), before
