"""Iso-C: the directions of the weighted sum of the updates, all made equally strong."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hiplora.merging.options import check_number

if TYPE_CHECKING:
    from hiplora.adapters import Channels, Pair
    from hiplora.merging.term import Term


@dataclass(frozen=True)
class Options:
    """Settings of Iso-C.

    Args:
        scale: factor of the merged update.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_number("scale", self.scale)


def combine(terms: "Sequence[Term]", options: Options) -> "tuple[Pair, Channels | None]":
    """Merge the updates of one module, to the rank of their sum.

    With `Σ_t w_t ΔW_t = U diag(σ) Vᵀ`, the result is `scale · σ̄ U Vᵀ`, `σ̄` the mean of the singular values that are
    not zero.
    """
    import torch

    from hiplora.merging.thin import balanced, thin_svd

    A = torch.cat([term.factors[0] for term in terms])
    B = torch.cat([term.weight * term.factors[1] for term in terms], dim=1)
    U, sigma, V = thin_svd((A, B))
    return balanced(U, options.scale * sigma.mean().expand_as(sigma), V), None
