"""Measurements as the aims read them: values with the bounds of their intervals, seen from the reference."""

from dataclasses import dataclass

from hiplora.reporting.study.spec import Measurement


@dataclass(frozen=True)
class Value:
    """A value that an aim is judged by; a bound that is None is open. `against`: of which method it is, or over which.

    `bounded` says that the method compared with never learned as much.
    """

    value: float
    low: float | None
    high: float | None
    against: str
    bounded: bool = False


def inverse(one: Measurement) -> Value:
    """The reference over a LoRA, of what was measured as the LoRA over the reference."""
    if one.value <= 0 or (one.low is not None and one.low <= 0):
        return Value(1 / one.value if one.value else float("inf"), None, None, one.method)
    low, high = (None if bound is None else 1 / bound for bound in (one.high, one.low))
    return Value(1 / one.value, low, high, one.method)


def negative(value: Value, method: str) -> Value:
    """The reference minus a LoRA, of what was measured as the LoRA, `method`, minus the reference."""
    low, high = (None if bound is None else -bound for bound in (value.high, value.low))
    return Value(-value.value, low, high, method)


def apart(one: Measurement, other: str) -> Value:
    """A difference with its widest interval; where all of some edits or merges agree, with what their number leaves
    possible.

    The latter is the exact bound on a share of which none was seen.
    """
    low, high = one.widest
    if low == high == 0 and (count := one.items or one.setting.get("merges")):
        _, high = exact(0, count)
        low = -high
    return Value(one.value, low, high, other)


def share_of_merges(one: Measurement) -> Value:
    """A share of merges, its interval over items widened to what that many merges leave possible.

    The latter are the exact bounds.
    """
    low, high, merges = one.low, one.high, one.setting.get("merges")
    if merges:
        failed = round(one.value / 100 * merges)
        least, most = exact(failed, merges)
        low = min(least, one.value if low is None else low)
        high = max(most, one.value if high is None else high)
    return Value(one.value, low, high, one.method)


def exact(count: int, of: int) -> tuple[float, float]:
    """Return the 95 % bounds of a share in per cent, Clopper and Pearson's."""
    from scipy import stats

    found = stats.binomtest(count, of).proportion_ci(0.95, "exact")
    return 100 * found.low, 100 * found.high


def share_of_losses(one: Measurement) -> Value:
    """A rival's share: whether all seeds agree on "everywhere" or on less stands for the interval."""
    everywhere, seeds = one.setting.get("everywhere", 0), one.seeds
    low = 1.0 if one.value == 1 and everywhere == seeds else 0.0
    high = one.value if one.value < 1 and not everywhere else 1.0
    return Value(one.value, min(low, one.value), high, one.method)
