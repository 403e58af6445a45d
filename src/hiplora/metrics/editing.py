"""Knowledge edits: whether they took, and what became of everything else."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hiplora.errors import DataError
from hiplora.metrics.checks import finite, require


@dataclass(frozen=True)
class Locality:
    """What editing did to prompts that have nothing to do with the edits.

    `accuracy_change` is accuracy after − before, in percentage points: negative is damage, and its size is what the
    paper reports. `log_prob_change` is the mean of log p after − before of their answers, in nats; None if not given.
    """

    accuracy_change: float
    log_prob_change: float | None = None


def edit_preferred(log_prob_new: ArrayLike, log_prob_old: ArrayLike) -> NDArray[np.bool_]:
    """Return, per edit, whether `log p(new) > log p(old)`; a tie is no success. Shape (edits,).

    Args:
        log_prob_new: log-probability of the new answer, summed over its tokens, in nats; shape (edits,).
        log_prob_old: that of the old one.

    Raises:
        DataError: there are no edits, the shapes differ, or a value is not finite.

    Source: HiP-LoRA, appendix C.4.
    """
    new, old = _same_length(log_prob_new, log_prob_old, "log_prob_new", "log_prob_old")
    return new > old


def edit_success(successes: ArrayLike) -> float:
    """Return the share of edits that took, in per cent; higher is better.

    Args:
        successes: per edit True or False, shape (edits,): from `edit_preferred`, or whether the model's answer
            matches the new one.

    Raises:
        DataError: there are no edits, or a value is neither true nor false.

    Source: HiP-LoRA, appendix C.4.
    """
    return float(100 * _booleans(successes, "successes").mean())


def locality(
    base_correct: ArrayLike,
    edited_correct: ArrayLike,
    base_log_probs: ArrayLike | None = None,
    edited_log_probs: ArrayLike | None = None,
) -> Locality:
    """Compare the model after editing with the one before, on unrelated prompts.

    Args:
        base_correct: per prompt, whether the model before answers it right; shape (prompts,).
        edited_correct: the same of the model after.
        base_log_probs: log-probability of each prompt's answer before, in nats; shape (answers,); optional.
        edited_log_probs: the same after.

    Raises:
        DataError: there are no prompts, the shapes differ, only one model's log-probabilities are given, or a value
            is not finite, or neither true nor false.

    Source: HiP-LoRA, appendix C.4.
    """
    before, after = _booleans(base_correct, "base_correct"), _booleans(edited_correct, "edited_correct")
    _same_length(before, after, "base_correct", "edited_correct")
    accuracy_change = float(100 * (after.mean() - before.mean()))
    if base_log_probs is None and edited_log_probs is None:
        return Locality(accuracy_change)
    if base_log_probs is None or edited_log_probs is None:
        raise DataError(
            "log-probabilities are given of one model only; give base_log_probs and edited_log_probs"
        )
    old, new = _same_length(base_log_probs, edited_log_probs, "base_log_probs", "edited_log_probs")
    return Locality(accuracy_change, float((new - old).mean()))


def _booleans(values: ArrayLike, what: str) -> NDArray[np.float64]:
    array = finite(values, what)
    require((array == 0) | (array == 1), array, what, "True or False")
    return array


def _same_length(
    one: ArrayLike, other: ArrayLike, name: str, other_name: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = finite(one, name), finite(other, other_name)
    if len(first) != len(second):
        raise DataError(f"{name} has {len(first)} values, {other_name} has {len(second)}; expected as many")
    return first, second
