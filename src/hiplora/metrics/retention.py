"""How much of the other abilities an adapter cost."""

from hiplora.errors import ConfigError, DataError
from hiplora.metrics.checks import Scores, same_names, scores


def retain(base: Scores, adapted: Scores, domain: str) -> float:
    """Return the paper's Retain: the mean drop on all benchmarks but the adapter's own, in percentage points.

    `mean over b ≠ domain of base[b] − adapted[b]`; lower is better. Drops are signed: a gain counts as a negative
    drop. The scores on `domain` itself are not used, and `adapted` need not have one.

    Args:
        base: score of the base model on each benchmark of the suite, in per cent.
        adapted: score of the adapted model on each, in per cent.
        domain: the benchmark whose domain the adapter was trained on.

    Raises:
        ConfigError: `domain` is not a benchmark of `base`.
        DataError: the benchmarks differ, none but `domain` is left, or a score is not finite or below 0.

    Source: HiP-LoRA, appendix C.2, Eq. 11.
    """
    before, after = scores(base, "base"), scores(adapted, "adapted")
    if domain not in before:
        raise ConfigError(
            f"domain {domain!r} is not among the benchmarks; expected one of {', '.join(before)}"
        )
    del before[domain]
    after.pop(domain, None)
    if not before:
        raise DataError(f"base: has no benchmark but the domain {domain!r}; Retain needs others")
    same_names(after, before, "adapted", "base", "benchmark")
    return sum(before[name] - after[name] for name in before) / len(before)
