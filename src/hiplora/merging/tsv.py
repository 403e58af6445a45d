"""TSV-Merge: the leading singular triplets of every update, their directions made orthogonal to each other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hiplora.merging.options import check_number, check_share

if TYPE_CHECKING:
    from torch import Tensor

    from hiplora.adapters import Channels, Pair
    from hiplora.merging.term import Term


@dataclass(frozen=True)
class Options:
    """Settings of TSV-Merge.

    Args:
        sv_reduction: share of each update's singular triplets that is kept, rounded up, in (0, 1]. None is the paper's
            rule, a T-th of min(out, in) for T updates: all triplets of updates of low rank.
        scale: factor of the merged update.
    """

    sv_reduction: float | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.sv_reduction is not None:
            check_share("sv_reduction", self.sv_reduction)
        check_number("scale", self.scale)


def combine(terms: "Sequence[Term]", options: Options) -> "tuple[Pair, Channels | None]":
    """Merge the updates of one module, to the rank of all triplets that are kept.

    `ΔW = Û diag(w_1 σ_1, …, w_T σ_T) V̂ᵀ`, where `Û` and `V̂` are the orthogonal polar factors of the updates' left and
    right singular vectors side by side: the orthonormal ones nearest to them.
    """
    import torch

    from hiplora.merging.thin import balanced, polar, thin_svd

    parts = [_leading(thin_svd(term.factors), len(terms), options.sv_reduction) for term in terms]
    U, V = (polar(torch.cat([part[side] for part in parts], dim=1)) for side in (0, 2))
    sigma = torch.cat(
        [options.scale * term.weight * part[1] for term, part in zip(terms, parts, strict=True)]
    )
    return balanced(U, sigma, V), None


def _leading(
    triplets: "tuple[Tensor, Tensor, Tensor]", updates: int, share: float | None
) -> "tuple[Tensor, Tensor, Tensor]":
    U, sigma, V = triplets
    of_all = max(1, min(U.shape[0], V.shape[0]) // updates)
    count = of_all if share is None else math.ceil(share * len(sigma))
    return U[:, :count], sigma[:count], V[:, :count]
