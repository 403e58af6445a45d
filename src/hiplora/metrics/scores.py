"""The paper's metrics and a few of the field's: pure functions over numbers. Scores are in per cent, higher is better.

All raise DataError where values are missing, do not match, are not finite or are out of range, and ConfigError where a
parameter is out of range; the message names the place and the value.
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hiplora.errors import ConfigError, DataError

Floats = NDArray[np.float64]
Scores = Mapping[str, float]  # benchmark or task -> score in per cent

DEFAULT_TAU = 0.9
DEFAULT_TAUS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
_ROUNDING = 1e-12  # relative: 55 is not below 0.55 · 100, though floating point says so
_ABOVE_ZERO = 1e-3  # nats by which rounding may lift a sum of log-probabilities above 0


def retain(base: Scores, adapted: Scores, domain: str) -> float:
    """Return the paper's Retain (appendix C.2, Eq. 11): the mean of `base[b] − adapted[b]` over all b ≠ domain.

    In percentage points; lower is better, a gain is negative. `adapted` need not have a score on `domain`.
    """
    if domain not in base:
        raise ConfigError(f"domain {domain!r} is not among the benchmarks; expected one of {', '.join(base)}")
    before, after = ({name: table[name] for name in table if name != domain} for table in (base, adapted))
    if not before:
        raise DataError(f"base: has no benchmark but the domain {domain!r}; Retain needs others")
    _check_tables(after, before, "adapted", "base", "benchmark")
    return sum(before[name] - after[name] for name in before) / len(before)


def merge_fail(merged: Sequence[Scores], single: Sequence[Scores], tau: float) -> float:
    """Return the paper's MergeFail (appendix C.3): the fraction, in [0, 1], of merges that fail; lower is better.

    `merged` has the merged model's score on each task of each merge, `single` that of the task's adapter alone. A merge
    fails if any of its tasks has `merged < tau · single`, more than rounding.
    """
    if not 0 < tau <= 1:
        raise ConfigError(f"tau is {tau}; expected a threshold in (0, 1]")
    _check_merges(merged, single)
    return float(np.mean([fails(after, before, tau) for after, before in zip(merged, single, strict=True)]))


def fails(merged: Mapping[str, ArrayLike], single: Mapping[str, ArrayLike], tau: float) -> NDArray[np.bool_]:
    """Return whether any task of one merge `falls_below`; elementwise where scores are arrays of replicates."""
    return np.any([falls_below(merged[task], single[task], tau) for task in single], axis=0)


def falls_below(merged: ArrayLike, single: ArrayLike, tau: float) -> NDArray[np.bool_]:
    """Return where `merged < τ · single`, elementwise; equality up to rounding is not below."""
    return np.asarray(merged) < tau * np.asarray(single) * (1 - _ROUNDING)


def mean_post_merge_drop(merged: Scores | Sequence[Scores], single: Scores | Sequence[Scores]) -> float:
    """Return the paper's mean drop (table 2): the mean of `|single − merged|` over every task of every merge, in pp.

    Lower is better; a task that merging improved counts, too. Takes one table of scores, or one per merge.
    """
    after = [merged] if isinstance(merged, Mapping) else merged
    before = [single] if isinstance(single, Mapping) else single
    _check_merges(after, before)
    pairs = zip(after, before, strict=True)
    return float(np.mean([abs(old[task] - new[task]) for new, old in pairs for task in old]))


# Continual learning: `matrix[t][i]` is the score on task i after stage t, shape (T, T); above the diagonal (tasks not
# trained yet) it may be NaN or None. The functions in CONTINUAL take further axes of replicates.


def average_accuracy(matrix: ArrayLike) -> float:
    """Return AvgAcc (the paper's appendix C.4), the mean over tasks after the last stage, `(1/T) Σ_i Acc[T, i]`."""
    return float(CONTINUAL["average accuracy"](_accuracies(matrix)))


def forgetting(matrix: ArrayLike) -> float:
    """Return how far tasks fell below their best earlier score, `1/(T−1) Σ_{i<T} (max_{t<T} Acc[t, i] − Acc[T, i])`.

    In percentage points; lower is better. Source: HiP-LoRA, appendix C.4; Chaudhry et al. 2018.
    """
    return float(CONTINUAL["forgetting"](_accuracies(matrix, stages=2)))


def backward_transfer(matrix: ArrayLike) -> float:
    """Return BWT (Lopez-Paz and Ranzato 2017), `1/(T−1) Σ_{i<T} (Acc[T, i] − Acc[i, i])`, in pp; higher is better."""
    return float(CONTINUAL["backward transfer"](_accuracies(matrix, stages=2)))


def learned_accuracy(matrix: ArrayLike) -> float:
    """Return each task's score just after it was trained, the mean in per cent (Riemer et al. 2019)."""
    return float(CONTINUAL["learned accuracy"](_accuracies(matrix)))


CONTINUAL: Mapping[str, Callable[[Floats], Floats]] = {
    "average accuracy": lambda a: a[-1].mean(axis=0),
    "forgetting": lambda a: (np.nanmax(a[:-1, :-1], axis=0) - a[-1, :-1]).mean(axis=0),
    "backward transfer": lambda a: (a[-1] - np.moveaxis(a.diagonal(), -1, 0))[:-1].mean(axis=0),
    "learned accuracy": lambda a: a.diagonal().mean(axis=-1),
}


def _accuracies(matrix: ArrayLike, stages: int = 1) -> Floats:
    array = _numbers(matrix, "matrix", 2)
    if array.shape[0] != array.shape[1]:
        raise DataError(f"matrix: has shape {array.shape}; expected one row per stage and as many tasks")
    if len(array) < stages:
        raise DataError(f"matrix: has {len(array)} stage; expected at least {stages}")
    unseen = np.triu(np.isnan(array), k=1)
    _require((np.isfinite(array) & (array >= 0)) | unseen, array, "matrix", "a score in per cent, at least 0")
    return array


def answer_likelihood(log_prob: float, tokens: int) -> float:
    """Return how likely a token of the answer is, in per cent: `100 · exp(log_prob / tokens)`, log_prob in nats."""
    count = whole_number(tokens, "tokens", 1)
    if not log_prob <= _ABOVE_ZERO:
        raise DataError(f"log_prob is {log_prob}; a log-probability is at most 0")
    return 100 * math.exp(min(log_prob, 0.0) / count)


def gold_probability(log_likelihoods: ArrayLike, gold: int) -> float:
    """Return the right choice's share of the choices' probability (nats), in per cent: `100 · softmax(ℓ)[gold]`."""
    choices, index = finite(log_likelihoods, "log_likelihoods"), whole_number(gold, "gold", 0)
    if index >= len(choices):
        raise DataError(f"gold is {index}, and there are {len(choices)} choices; expected an index below that")
    shares = np.exp(choices - choices.max())
    return float(100 * shares[index] / shares.sum())


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the unbiased pass@k of n samples with c right, `1 − C(n−c, k) / C(n, k)` (Chen et al. 2021, Eq. 1)."""
    n, c, k = whole_number(n, "n", 1), whole_number(c, "c", 0), whole_number(k, "k", 1)
    if c > n:
        raise DataError(f"c is {c} right samples of n = {n}; expected at most n")
    if k > n:
        raise ConfigError(f"k is {k}, and there are n = {n} samples; lower k or draw more samples")
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


@dataclass(frozen=True)
class Locality:
    """What editing did to unrelated prompts: change of accuracy, in pp, and of answers' log-probability, in nats."""

    accuracy_change: float
    log_prob_change: float | None = None


def locality(
    base_correct: ArrayLike,
    edited_correct: ArrayLike,
    base_log_probs: ArrayLike | None = None,
    edited_log_probs: ArrayLike | None = None,
) -> Locality:
    """Compare answers to unrelated prompts, right or wrong and in nats, after editing and before (the paper's C.4)."""
    accuracy = _mean_change("correct", base_correct, edited_correct)
    if base_log_probs is None or edited_log_probs is None:
        return Locality(100 * accuracy)
    return Locality(100 * accuracy, _mean_change("log_probs", base_log_probs, edited_log_probs))


def _mean_change(name: str, base: ArrayLike, edited: ArrayLike) -> float:
    before, after = finite(base, f"base_{name}"), finite(edited, f"edited_{name}")
    if len(before) != len(after):
        raise DataError(f"base_{name} has {len(before)} values, edited_{name} has {len(after)}; expected as many")
    return float(after.mean() - before.mean())


def whole_number(value: Any, name: str, least: int) -> int:
    """Return `value` as an int of at least `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise ConfigError(f"{name} is {value!r}; expected a whole number of at least {least}")
    return number


def _numbers(values: ArrayLike, name: str, axes: int) -> Floats:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: not an array of numbers ({error})") from None
    if array.ndim != axes or array.size == 0:
        raise DataError(f"{name}: has shape {array.shape}; expected {axes} axes of numbers, not empty")
    return array


def finite(values: ArrayLike, name: str, axes: int = 1) -> Floats:
    """Return values as an array of finite numbers with so many axes, not empty."""
    array = _numbers(values, name, axes)
    _require(np.isfinite(array), array, name, "a finite number")
    return array


def _require(good: NDArray[np.bool_], array: NDArray, name: str, expected: str) -> None:
    if not good.all():
        indices = tuple(np.argwhere(~good)[0].tolist())
        subscript = "".join(f"[{index}]" for index in indices)
        raise DataError(f"{name}{subscript} is {array[indices]}; expected {expected}")


def _check_merges(merged: Sequence[Scores], single: Sequence[Scores]) -> None:
    if len(merged) != len(single) or not len(merged):
        raise DataError(
            f"merged has {len(merged)} merges, single has {len(single)}; expected the same number, at least 1"
        )
    for index, (after, before) in enumerate(zip(merged, single, strict=True)):
        _check_tables(after, before, f"merged[{index}]", f"single[{index}]", "task")


def _check_tables(first: Scores, second: Scores, first_name: str, second_name: str, kind: str) -> None:
    """Check that two tables have scores in per cent on the same benchmarks or tasks (`kind`)."""
    for table, name, other_name in ((first, first_name, second_name), (second, second_name, first_name)):
        for key, value in table.items():
            if not 0 <= value < math.inf:
                raise DataError(f"{name}[{key!r}] is {value}; expected a score in per cent, at least 0")
        if missing := [key for key in (*first, *second) if key not in table]:
            raise DataError(
                f"{name}: {kind} {missing[0]!r} is missing, and {other_name} has it; score both on the same {kind}s"
            )
