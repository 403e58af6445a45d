"""Entries of dense updates, in place and a few rows at a time: a merge must not need many copies of a module."""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

_BLOCK, _HALF = 1 << 20, 1 << 16


def row_blocks(shape: Sequence[int], copies: int = 1) -> Iterator[slice]:
    """Yield slices of a tensor's first dimension so that `copies` of each hold 2²⁰ numbers at most, or one row each."""
    step = max(1, _BLOCK // max(1, copies * math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def keep_largest_(delta: Float[Tensor, "m n"], density: float) -> Float[Tensor, "m n"]:
    """Zero, in place, all but the ⌊density · mn⌋ entries of largest magnitude of an fp32 matrix; return it.

    What PEFT's `prune(delta, density, "magnitude")` returns, but that several entries of just the last magnitude that
    is kept all stay. PEFT's sorts pairs of value and index, for which it needs four to five times the matrix.
    """
    if density >= 1:
        return delta
    count = int(density * delta.numel())
    if not count:
        return delta.zero_()
    threshold = magnitude_of_rank(delta, count)
    for rows in row_blocks(delta.shape):
        delta[rows].masked_fill_(delta[rows].abs() < threshold, 0.0)
    return delta


def weighted_sum_(terms: Iterable[tuple[Tensor, float]]) -> Float[Tensor, "m n"]:
    """Return `Σ w_t ΔW_t` in the memory of the first update; the others are overwritten, and taken one at a time.

    Raises:
        ValueError: there are no terms.
    """
    total: Tensor | None = None
    for delta, weight in terms:
        delta.mul_(weight)
        total = delta if total is None else total.add_(delta)
    if total is None:
        raise ValueError("no terms to add")
    return total


def magnitude_of_rank(delta: Float[Tensor, "m n"], count: int) -> float:
    """Return the magnitude of the entry that is `count`-th in descending order, 1 … mn, of a finite fp32 matrix.

    Exact. Without its sign bit a float's bits are an integer in the order of magnitudes: the upper half of them is
    counted first, then the lower half among the entries that have the right upper one.
    """
    upper = torch.zeros(_HALF, dtype=torch.int64)
    for rows in row_blocks(delta.shape):
        upper += torch.bincount(_bits(delta[rows]) >> 16, minlength=_HALF)
    top, above = _bin_of(upper, count)
    lower = torch.zeros(_HALF, dtype=torch.int64)
    for rows in row_blocks(delta.shape):
        bits = _bits(delta[rows])
        lower += torch.bincount(bits[bits >> 16 == top] & (_HALF - 1), minlength=_HALF)
    bottom, _ = _bin_of(lower, count - above)
    return torch.tensor(top * _HALF + bottom, dtype=torch.int32).view(torch.float32).item()


def _bits(block: Tensor) -> Tensor:
    return block.abs().view(torch.int32).flatten()


def _bin_of(counts: Tensor, rank: int) -> tuple[int, int]:
    """Return the bin that the `rank`-th largest is in, and how many are in the bins above it."""
    down = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(down, rank))
    return len(counts) - 1 - place, int(down[place - 1]) if place else 0
