"""KnOTS: bring the updates into output directions that they share, and merge their coordinates there by TIES."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hiplora.merging import ties
from hiplora.merging.options import check_number, check_share

if TYPE_CHECKING:
    from hiplora.adapters import Channels, Pair
    from hiplora.merging.term import Term


@dataclass(frozen=True)
class Options:
    """Settings of KnOTS with TIES.

    Args:
        density: share of each update's coordinates that is kept, the largest by magnitude, in (0, 1].
        scale: factor of the merged update.
    """

    density: float = 0.2
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_share("density", self.density)
        check_number("scale", self.scale)


def combine(terms: "Sequence[Term]", options: Options) -> "tuple[Pair, Channels | None]":
    """Merge the updates of one module, to a rank of their ranks' sum at most.

    With `[ΔW_1 … ΔW_T] = U Σ [V_1ᵀ … V_Tᵀ]`, the result is `U · TIES(Σ V_1ᵀ, …, Σ V_Tᵀ)`. U is found in factor space,
    and `Σ V_tᵀ = Uᵀ ΔW_t` has as many rows as U has columns.
    """
    from hiplora.merging.term import DenseTerm
    from hiplora.merging.thin import shared_outputs, zero_pair

    U = shared_outputs([term.factors for term in terms])
    if not U.shape[1]:
        return zero_pair(terms[0].factors[1].shape[0], terms[0].factors[0].shape[1]), None
    coordinates = (((U.T @ term.factors[1].double()) @ term.factors[0].double()).float() for term in terms)
    aligned = (DenseTerm(part, term.weight) for part, term in zip(coordinates, terms, strict=True))
    merged = ties.combine(aligned, ties.Options(options.density, options.scale))
    return (merged, U.float()), None
