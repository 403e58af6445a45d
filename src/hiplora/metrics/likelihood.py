"""Scores that a small model can move on: how likely the right answer is, rather than whether it comes first."""

import math

import numpy as np
from numpy.typing import ArrayLike

from hiplora.errors import DataError
from hiplora.metrics.checks import finite, integer

_ROUNDING = 1e-3  # nats by which a sum of log-probabilities may exceed 0


def answer_likelihood(log_prob: float, tokens: int) -> float:
    """Return how likely a token of the answer is, in per cent: `100 · exp(log_prob / tokens)`.

    It is the geometric mean of the tokens' probabilities, 100 over the answer's perplexity.

    Args:
        log_prob: log-probability of the answer, summed over its tokens, in nats.
        tokens: number of its tokens, at least 1.

    Raises:
        ConfigError: `tokens` is no whole number of at least 1.
        DataError: `log_prob` is not finite, or above 0.
    """
    count, total = integer(tokens, "tokens", 1), float(finite(log_prob, "log_prob", axes=0))
    if total > _ROUNDING:
        raise DataError(f"log_prob is {total}; a log-probability is at most 0")
    return 100 * math.exp(min(total, 0.0) / count)


def gold_probability(log_likelihoods: ArrayLike, gold: int) -> float:
    """Return the right choice's share of the probability of all choices, in per cent.

    `100 · exp(ℓ_gold) / Σ_c exp(ℓ_c)`: 100/n for a model that cannot tell n choices apart.

    Args:
        log_likelihoods: of each choice, in nats, shape (choices,); only their differences matter.
        gold: index of the right choice, from 0.

    Raises:
        ConfigError: `gold` is no whole number of at least 0.
        DataError: there are no choices, `gold` is none of them, or a value is not finite.
    """
    choices, index = finite(log_likelihoods, "log_likelihoods"), integer(gold, "gold", 0)
    if index >= len(choices):
        raise DataError(
            f"gold is {index}, and there are {len(choices)} choices; expected an index below that"
        )
    shares = np.exp(choices - choices.max())
    return float(100 * shares[index] / shares.sum())
