"""Learning tasks one after the other: what is known at the end, and what was lost on the way.

`matrix[t][i]` is the score on task i after stage t, in per cent, of shape (T, T): stage t trains task t. The scores of
tasks that were not trained yet, above the diagonal, may be NaN or None: not measured.
"""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hiplora.errors import DataError
from hiplora.metrics.checks import numbers, require


def average_accuracy(matrix: ArrayLike) -> float:
    """Return AvgAcc, the mean score over all tasks after the last stage, in per cent: `(1/T) Σ_i Acc[T, i]`.

    Raises:
        DataError: `matrix` is not square, or a score on or below the diagonal is not finite or below 0.

    Source: HiP-LoRA, appendix C.4.
    """
    return float(_average(_accuracies(matrix)))


def forgetting(matrix: ArrayLike) -> float:
    """Return how far tasks fell below their best earlier score, in percentage points; lower is better.

    `1/(T−1) Σ_{i<T} (max_{t<T} Acc[t, i] − Acc[T, i])`. The maximum is over all earlier stages that were measured,
    those before task i was trained among them. Negative where the last stage is the best.

    Raises:
        DataError: as `average_accuracy`, or there are fewer than two stages.

    Source: HiP-LoRA, appendix C.4; Chaudhry et al. 2018.
    """
    return float(_fall_from_best(_accuracies(matrix, stages=2)))


def backward_transfer(matrix: ArrayLike) -> float:
    """Return BWT, what later stages did to tasks since each was trained, in percentage points; higher is better.

    `1/(T−1) Σ_{i<T} (Acc[T, i] − Acc[i, i])`.

    Raises:
        DataError: as `average_accuracy`, or there are fewer than two stages.

    Source: Lopez-Paz and Ranzato 2017 (GEM).
    """
    return float(_since_trained(_accuracies(matrix, stages=2)))


def learned_accuracy(matrix: ArrayLike) -> float:
    """Return the mean score of each task just after it was trained, in per cent: the mean of the diagonal.

    Raises:
        DataError: as `average_accuracy`.

    Source: Riemer et al. 2019 (MER), "learning accuracy".
    """
    return float(_just_trained(_accuracies(matrix)).mean())


def _accuracies(matrix: ArrayLike, stages: int = 1) -> NDArray[np.float64]:
    array = numbers(matrix, "matrix", axes=2)
    if array.shape[0] != array.shape[1]:
        raise DataError(f"matrix: has shape {array.shape}; expected a row a stage and as many tasks")
    if len(array) < stages:
        raise DataError(f"matrix: has {len(array)} stage; expected at least {stages}")
    unseen = np.triu(np.isnan(array), k=1)
    require((np.isfinite(array) & (array >= 0)) | unseen, array, "matrix", "a score in per cent, at least 0")
    return array


def _average(accuracies: NDArray[np.float64]) -> NDArray[np.float64]:
    return accuracies[-1].mean(axis=0)


def _fall_from_best(accuracies: NDArray[np.float64]) -> NDArray[np.float64]:
    return (np.nanmax(accuracies[:-1, :-1], axis=0) - accuracies[-1, :-1]).mean(axis=0)


def _since_trained(accuracies: NDArray[np.float64]) -> NDArray[np.float64]:
    return (accuracies[-1] - _just_trained(accuracies))[:-1].mean(axis=0)


def _just_trained(accuracies: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.moveaxis(accuracies.diagonal(), -1, 0)


# The metrics of this module over sound scores of shape (T, T, …): further axes are replicates, each computed apart.
CONTINUAL: Mapping[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "average accuracy": _average,
    "forgetting": _fall_from_best,
    "backward transfer": _since_trained,
    "learned accuracy": lambda accuracies: _just_trained(accuracies).mean(axis=0),
}
