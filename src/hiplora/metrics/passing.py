"""pass@k of sampled programs."""

import numpy as np

from hiplora.errors import ConfigError, DataError
from hiplora.metrics.checks import integer


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the unbiased estimate of pass@k, in [0, 1]: that at least one of k samples is right.

    `1 − C(n−c, k) / C(n, k)`, as a product of min(c, k) factors summed up in logarithms: exact to rounding for any n.

    Args:
        n: number of samples of one problem.
        c: how many of them are right, from 0 to n.
        k: how many samples one may show, from 1 to n.

    Raises:
        ConfigError: one is no whole number, or out of range.
        DataError: more are right than there are.

    Source: Chen et al. 2021 (HumanEval), Eq. 1.
    """
    n, c, k = integer(n, "n", 1), integer(c, "c", 0), integer(k, "k", 1)
    if c > n:
        raise DataError(f"c is {c} right samples of n = {n}; expected at most n")
    if k > n:
        raise ConfigError(f"k is {k}, and there are n = {n} samples; lower k or draw more samples")
    if n - c < k:
        return 1.0
    fewer, more = min(c, k), max(c, k)
    return float(-np.expm1(np.log1p(-more / (n - np.arange(fewer))).sum())) + 0.0  # not the -0.0 of c = 0
