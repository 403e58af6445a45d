"""TIES: trim each update to its largest entries, elect a sign for each entry, average those that agree."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hiplora.merging.options import check_number, check_share

if TYPE_CHECKING:
    from torch import Tensor

    from hiplora.merging.term import DenseTerm


@dataclass(frozen=True)
class Options:
    """Settings of TIES.

    Args:
        density: share of each update's entries that is kept, the largest by magnitude, in (0, 1].
        scale: λ, factor of the merged update.
    """

    density: float = 0.2
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_share("density", self.density)
        check_number("scale", self.scale)


def combine(terms: "Iterable[DenseTerm]", options: Options) -> "Tensor":
    """Merge the updates (m, n) of one module; they are overwritten.

    Of each entry, the sign of the sum of the trimmed updates is elected (of a zero sum, plus), and
    `scale · Σ_agreeing w_t τ_t / #agreeing` is the result: weights scale what is averaged, not the vote, as in PEFT.
    """
    import torch
    from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge

    from hiplora.merging.entries import keep_largest_, row_blocks

    trimmed, weights = [], []
    for term in terms:
        trimmed.append(keep_largest_(term.delta, options.density))
        weights.append(term.weight)
    scale = torch.tensor(weights, dtype=torch.float64).view(-1, 1, 1)
    merged = trimmed[0]
    for rows in row_blocks(merged.shape, copies=8 * len(trimmed)):
        # In float64 the sum of a few fp32 numbers has its true sign, whatever their order.
        stacked = torch.stack([delta[rows] for delta in trimmed]).double()
        agreeing = calculate_majority_sign_mask(stacked)
        merged[rows] = options.scale * disjoint_merge(stacked * scale, agreeing)
    return merged
