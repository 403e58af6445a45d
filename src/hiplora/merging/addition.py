"""Addition: the weighted sum of the updates, exact in factor space (`ΔW_merged = Σ_t w_t ΔW_t`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hiplora.adapters import Channels, Pair
    from hiplora.merging.term import Term


@dataclass(frozen=True)
class Options:
    """Addition has no settings beyond the adapters' weights."""


def combine(terms: "Sequence[Term]", options: Options) -> "tuple[Pair, Channels | None]":
    """Add updates of one module without forming or averaging any of them.

    HiP-LoRA terms with bit-equal U and V share their gains: `δ = Σ w_t δ_t`, and their residual channels are
    concatenated, so that two adapters of rank r + k make one of rank 2r + k. Everything else is concatenated with
    its weight folded into `B'`. Channels are returned where all terms share one basis.

    Terms of weight 0 are left out; if all are, the result is a zero update of the first term's rank.
    """
    import torch

    kept = [term for term in terms if term.weight != 0] or [terms[0]]
    groups: list[list[Term]] = []
    for term in kept:
        group = next((g for g in groups if _share_basis(g[0], term)), None)
        if group is None:
            groups.append([term])
        else:
            group.append(term)
    merged = [_merge_channels(group) if group[0].channels is not None else None for group in groups]
    pairs = [
        channels.factors() if channels is not None else _weighted(group[0])
        for group, channels in zip(groups, merged, strict=True)
    ]
    factors = torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs], dim=1)
    return factors, merged[0] if len(merged) == 1 else None


def _share_basis(one: "Term", other: "Term") -> bool:
    """Tell whether two terms' gains mean the same directions.

    Only bit-equal bases count: two decompositions of one weight may rotate directions inside a cluster of equal
    singular values, and then adding gains would not be the sum of the updates.
    """
    import torch

    a, b = one.channels, other.channels
    if a is None or b is None or a.sides != b.sides or a.U.shape != b.U.shape or a.V.shape != b.V.shape:
        return False
    return torch.equal(a.U, b.U) and torch.equal(a.V, b.V)


def _merge_channels(group: "Sequence[Term]") -> "Channels":
    import torch

    from hiplora.adapters import Channels

    parts = [(term.weight, term.channels) for term in group if term.channels is not None]
    first = parts[0][1]
    gains = [weight * channels.delta for weight, channels in parts if channels.delta is not None]
    limits = [channels.leak_limit for _, channels in parts]
    return Channels(
        A=torch.cat([channels.A for _, channels in parts]),
        B=torch.cat([weight * channels.scaling * channels.B for weight, channels in parts], dim=1),
        U=first.U,
        sigma=first.sigma,
        V=first.V,
        delta=torch.stack(gains).sum(dim=0) if gains else None,
        scaling=1.0,
        sides=first.sides,
        leak_limit=None if None in limits else max(limit for limit in limits if limit is not None),
    )


def _weighted(term: "Term") -> "Pair":
    A, B = term.factors
    return A, term.weight * B
