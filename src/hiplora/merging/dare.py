"""DARE: drop entries of each update at random, scale up those that stay, and add."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hiplora.merging.options import check_count, check_flag, check_share

if TYPE_CHECKING:
    from torch import Tensor

    from hiplora.merging.term import DenseTerm


@dataclass(frozen=True)
class Options:
    """Settings of DARE.

    Args:
        density: probability with which an entry is kept, in (0, 1]; 1 minus the drop rate of the paper.
        rescale: divide what is kept by the density, so that the expected update stays the same.
        seed: of the draw; each module of each adapter draws by itself, by this and by its values.
    """

    density: float = 0.5
    rescale: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_share("density", self.density)
        check_flag("rescale", self.rescale)
        check_count("seed", self.seed, least=0)


def combine(terms: "Iterable[DenseTerm]", options: Options) -> "Tensor":
    """Return `Σ_t w_t (M_t ⊙ ΔW_t) / density`, (m, n), with M_t drawn from {0, 1}; the updates are overwritten."""
    from hiplora.merging.entries import weighted_sum_

    return weighted_sum_((_drop(term, options), term.weight) for term in terms)


def seed_of(term: "DenseTerm", seed: int) -> int:
    """Return the seed of one update's draw: the same whatever it is merged with, and in whatever order."""
    import hashlib

    return int.from_bytes(hashlib.blake2b(f"{seed} {term.key}".encode(), digest_size=7).digest())


def _drop(term: "DenseTerm", options: Options) -> "Tensor":
    import torch
    from peft.utils.merge_utils import prune

    from hiplora.merging.entries import row_blocks

    delta = term.delta
    if options.density == 1:
        return delta
    with torch.random.fork_rng(devices=[]):  # PEFT draws from the global state, which is put back
        torch.default_generator.manual_seed(seed_of(term, options.seed))
        for rows in row_blocks(delta.shape):
            delta[rows] = prune(delta[rows], options.density, method="random", rescale=options.rescale)
    return delta
