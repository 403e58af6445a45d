"""How far a model moved from its base on text, per token."""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hiplora.errors import DataError
from hiplora.metrics.checks import finite, numbers, require

_LIMIT = 700  # nats: exp of more overflows
_UNNORMALISED = 1e-2  # by which probabilities may miss a sum of 1: they may have been kept in half precision


def kl_drift(base: ArrayLike, adapted: ArrayLike) -> float:
    """Return the mean over tokens of KL(base‖adapted) of the next token, in nats; 0 is no drift.

    Args:
        base: the base's log-probabilities, shape (tokens, vocabulary); −inf is a probability of 0.
        adapted: the adapted model's at the same places.

    Raises:
        DataError: the shapes differ, a row is no distribution (logits, perhaps), or the adapted model excludes
            what the base does not: the divergence is infinite.
    """
    p_log, q_log = _distributions(base, "base"), _distributions(adapted, "adapted")
    if p_log.shape != q_log.shape:
        raise DataError(f"base has shape {p_log.shape}, adapted has {q_log.shape}; expected the same")
    possible = p_log > -np.inf
    require(~possible | (q_log > -np.inf), q_log, "adapted", "a probability above 0, as the base gives it")
    ratio = np.subtract(p_log, q_log, out=np.zeros_like(p_log), where=possible)
    return float((np.exp(p_log) * ratio).sum(axis=1).mean())


def perplexity_ratio(base: ArrayLike, adapted: ArrayLike, counts: ArrayLike | None = None) -> float:
    """Return `exp(mean NLL adapted − mean NLL base)`, the mean over tokens; above 1 the text became less likely.

    Args:
        base: the base's log-probability of each token that stands in the text, in nats, shape (tokens,); with
            `counts`, sums over passages of so many tokens each, shape (passages,).
        adapted: the adapted model's, for the same.
        counts: number of tokens of each passage, at least 1.

    Raises:
        DataError: there are no tokens, the shapes differ, a value is not finite, a count is no whole number ≥ 1,
            or the ratio overflows.
    """
    before, after = finite(base, "base"), finite(adapted, "adapted")
    if len(before) != len(after):
        raise DataError(f"base has {len(before)} values, adapted has {len(after)}; expected as many")
    tokens = np.ones(len(before)) if counts is None else counts
    change = per_token(before, tokens) - per_token(after, tokens)
    if change > _LIMIT:
        raise DataError(
            f"the text became {change:.0f} nats a token less likely; for sums over passages, give counts"
        )
    return math.exp(change)


def per_token(sums: ArrayLike, counts: ArrayLike) -> float:
    """Return the mean per token of what was summed up over passages: `Σ sums / Σ counts`.

    Every token weighs the same, whichever passage it is from. For KL divergences or log-probabilities, in nats.

    Args:
        sums: sum over each passage's tokens, shape (passages,).
        counts: number of tokens of each passage, at least 1, shape (passages,).

    Raises:
        DataError: as `perplexity_ratio`.
    """
    totals, tokens = finite(sums, "sums"), finite(counts, "counts")
    if len(totals) != len(tokens):
        raise DataError(f"there are {len(totals)} sums and {len(tokens)} counts; expected as many")
    require((tokens >= 1) & (tokens == np.floor(tokens)), tokens, "counts", "a whole number of at least 1")
    return float(totals.sum() / tokens.sum())


def _distributions(log_probs: ArrayLike, what: str) -> NDArray[np.float64]:
    array = numbers(log_probs, what, axes=2)
    require(array < np.inf, array, what, "a log-probability")
    with np.errstate(over="ignore"):
        totals = np.exp(array).sum(axis=1)
    good = np.abs(totals - 1) <= _UNNORMALISED
    require(
        good, totals, f"{what}: the sum of probabilities in row ", "1: give log-probabilities, not logits"
    )
    return array
