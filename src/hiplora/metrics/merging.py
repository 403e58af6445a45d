"""What merging broke: MergeFail, its table over thresholds, and the mean drop."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hiplora.errors import ConfigError, DataError
from hiplora.metrics.checks import Scores, same_names, scores

DEFAULT_TAU = 0.9
DEFAULT_TAUS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
_ROUNDING = 1e-12  # relative: 55 is not below 0.55 · 100, though floating point says so


def merge_fail(merged: Sequence[Scores], single: Sequence[Scores], tau: float) -> float:
    """Return MergeFail: the fraction, in [0, 1], of merges that fail; lower is better.

    A merge fails if any of its tasks has `merged < tau · single`. A score that equals the threshold, up to rounding,
    does not fail. A task whose single score is 0 cannot fail: there was nothing to lose.

    Args:
        merged: per merge, the score of the merged model on each of its tasks, in per cent.
        single: per merge, the score on each task of the adapter that was merged, alone, in per cent.
        tau: threshold in (0, 1]; `DEFAULT_TAU` is 0.9.

    Raises:
        ConfigError: `tau` lies outside (0, 1].
        DataError: there are no merges, their numbers or tasks differ, or a score is not finite or below 0.

    Source: HiP-LoRA, appendix C.3.
    """
    return float(merge_failures(merged, single, tau).mean())


def merge_failures(merged: Sequence[Scores], single: Sequence[Scores], tau: float) -> NDArray[np.bool_]:
    """Return, per merge, whether it fails: shape (merges,); arguments and errors are those of `merge_fail`.

    `100 * merge_failures(…)`, one list a seed, is what `paired_bootstrap` takes.
    """
    if not 0 < tau <= 1:
        raise ConfigError(f"tau is {tau}; expected a threshold in (0, 1]")
    return np.array([fails(after, before, tau) for after, before in _pairs(merged, single)])


def fails(merged: Mapping[str, ArrayLike], single: Mapping[str, ArrayLike], tau: float) -> NDArray[np.bool_]:
    """Tell whether one merge fails: any of its tasks `falls_below`; of arrays (a value a replicate), entry by entry."""
    return np.any([falls_below(merged[task], single[task], tau) for task in single], axis=0)


def falls_below(merged: ArrayLike, single: ArrayLike, tau: float) -> NDArray[np.bool_]:
    """Tell where `merged < τ · single`, entry by entry; a score that equals the threshold, up to rounding, does not."""
    return np.asarray(merged) < tau * np.asarray(single) * (1 - _ROUNDING)


def merge_fail_table(
    merged: Sequence[Scores], single: Sequence[Scores], taus: Sequence[float] = DEFAULT_TAUS
) -> dict[float, float]:
    """Return MergeFail at each threshold, in the order of `taus`; errors are those of `merge_fail`."""
    return {tau: merge_fail(merged, single, tau) for tau in taus}


def mean_post_merge_drop(merged: Scores | Sequence[Scores], single: Scores | Sequence[Scores]) -> float:
    """Return the mean absolute post-merge drop over all reported metrics, in percentage points; lower is better.

    The mean of `|single − merged|` over every task of every merge, each weighing the same. It is absolute: a task
    that merging improved counts as a change, too. Takes one table of scores, or one a merge.

    Args:
        merged: score of the merged model on each task, in per cent.
        single: score of each task's own adapter, alone, in per cent.

    Raises:
        DataError: there are no merges, their numbers or tasks differ, or a score is not finite or below 0.

    Source: HiP-LoRA, table 2.
    """
    after = [merged] if isinstance(merged, Mapping) else merged
    before = [single] if isinstance(single, Mapping) else single
    return float(np.mean([abs(old[task] - new[task]) for new, old in _pairs(after, before) for task in old]))


def _pairs(
    merged: Sequence[Scores], single: Sequence[Scores]
) -> list[tuple[dict[str, float], dict[str, float]]]:
    if len(merged) != len(single) or not len(merged):
        raise DataError(
            f"merged has {len(merged)} merges, single has {len(single)}; expected the same number, at least 1"
        )
    found = []
    for index, tables in enumerate(zip(merged, single, strict=True)):
        after, before = scores(tables[0], f"merged[{index}]"), scores(tables[1], f"single[{index}]")
        same_names(after, before, f"merged[{index}]", f"single[{index}]", "task")
        found.append((after, before))
    return found
