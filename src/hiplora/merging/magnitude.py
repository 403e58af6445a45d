"""Magnitude pruning: the weighted sum of the largest entries of each update."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hiplora.merging.options import check_share

if TYPE_CHECKING:
    from torch import Tensor

    from hiplora.merging.term import DenseTerm


@dataclass(frozen=True)
class Options:
    """Settings of magnitude pruning.

    Args:
        density: share of each update's entries that is kept, the largest by magnitude, in (0, 1].
    """

    density: float = 0.2

    def __post_init__(self) -> None:
        check_share("density", self.density)


def combine(terms: "Iterable[DenseTerm]", options: Options) -> "Tensor":
    """Return `Σ_t w_t trim(ΔW_t)`, (m, n); the updates are overwritten."""
    from hiplora.merging.entries import keep_largest_, weighted_sum_

    return weighted_sum_((keep_largest_(term.delta, options.density), term.weight) for term in terms)
