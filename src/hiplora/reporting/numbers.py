"""Numbers as a reader wants them: parsing what may be absent, and formatting with units.

Everything that a report prints goes through here, so that the same value looks the same in the terminal,
in a table and in a figure. A value that is None, not a number or NaN was not measured: it parses to None and
prints as an em dash or "not measured". Infinity is a measurement (a perplexity can overflow) and is kept.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

MISSING = "—"
MINUS = "−"
NBSP = "\u00a0"
_SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def number(value: Any) -> float | None:
    """Return `value` as a float, or None where it is absent, NaN or no number (booleans are no numbers)."""
    if value is None or isinstance(value, bool):
        return None
    try:
        result = float(value)
    except (TypeError, ValueError):
        return None
    return None if math.isnan(result) else result


def finite(values: Iterable[float | None]) -> list[float]:
    """Return the values that are present and finite."""
    return [value for value in values if value is not None and math.isfinite(value)]


def mean(values: Iterable[float | None]) -> float | None:
    """Return the arithmetic mean of the values that are present (an infinite one makes it infinite), or None."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Return the geometric mean of the positive values that are present, or None; it is the mean of ratios."""
    present = [value for value in values if value is not None and value > 0]
    return math.exp(sum(map(math.log, present)) / len(present)) if present else None


def median(values: Sequence[float]) -> float | None:
    """Return the median, or None of nothing."""
    if not values:
        return None
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def significant(value: float | None, digits: int = 3) -> str:
    """Format with `digits` significant digits: 0.0123, 1.23, 1,230; a power of ten outside 1e-4 … 1e7."""
    if value is None:
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    if exponent < -4 or exponent >= 7:
        mantissa = f"{value / 10**exponent:.{digits - 1}f}"
        return f"{mantissa}{NBSP}×{NBSP}{power_of_ten(exponent)}".replace("-", MINUS)
    return f"{value:,.{max(0, digits - 1 - exponent)}f}".replace("-", MINUS)


def power_of_ten(exponent: int) -> str:
    """Format 10ⁿ with Unicode superscripts, for axis ticks without mathematics markup."""
    return "10" + str(exponent).translate(_SUPERSCRIPTS)


def fixed(value: float | None, decimals: int = 3) -> str:
    """Format with a fixed number of decimals; falls back to `significant` where they would all be zeros."""
    if value is None or math.isinf(value) or (value != 0 and abs(value) < 0.5 * 10**-decimals):
        return significant(value)
    return f"{value:,.{decimals}f}".replace("-", MINUS)


def hundredths(value: float | None) -> str:
    """Format a number between −1 and 1, of which what rounds to zero is zero: 0.61, −0.23, 0.00."""
    if value is None or math.isinf(value):
        return significant(value)
    return f"{round(value, 2) + 0.0:.2f}".replace("-", MINUS)


def signed(value: float | None, decimals: int = 2) -> str:
    """Format a difference with its sign and a fixed number of decimals: +0.12, −3.40, ±0.00."""
    if value is None or math.isinf(value):
        return significant(value)
    rounded = round(value, decimals)
    sign = "+" if rounded > 0 else MINUS if rounded < 0 else "±"
    return f"{sign}{abs(rounded):,.{decimals}f}"


def percent(fraction: float | None, digits: int = 2) -> str:
    """Format a fraction of one as a percentage: 0.84 → 84 %, 0.0123 → 1.2 %, 1 → 100 %."""
    if fraction is None:
        return MISSING
    value = 100 * fraction
    if math.isinf(value):
        return significant(value)
    if abs(value) >= 99.95 or float(value).is_integer():
        return f"{value:,.0f}{NBSP}%".replace("-", MINUS)
    return f"{significant(value, digits)}{NBSP}%"


def change(ratio: float | None) -> str:
    """Format a ratio as a signed change in per cent: 1.034 → +3.4 %, 0.98 → −2.0 %, 1 → ±0 %."""
    if ratio is None:
        return MISSING
    if math.isinf(ratio):
        return significant(ratio)
    value = 100 * (ratio - 1)
    if abs(value) < 0.005:
        return f"±0{NBSP}%"
    decimals = 0 if abs(value) >= 100 else 1 if abs(value) >= 1 else 2
    return f"{value:+,.{decimals}f}{NBSP}%".replace("-", MINUS)


def count(value: float | None) -> str:
    """Format a whole number with thousands separators."""
    return MISSING if value is None else f"{value:,.0f}" if math.isfinite(value) else significant(value)


def duration(seconds: float | None) -> str:
    """Format a time: 41.2 s, 3 min 12 s, 2 h 05 min."""
    if seconds is None or math.isinf(seconds):
        return significant(seconds)
    if seconds < 59.95:
        return f"{significant(seconds)}{NBSP}s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}{NBSP}min {whole % 60:02d}{NBSP}s"
    minutes = round(seconds / 60)
    return f"{minutes // 60}{NBSP}h {minutes % 60:02d}{NBSP}min"


def storage(size: float | None) -> str:
    """Format bytes in binary units: 512 MiB, 1.61 GiB."""
    if size is None or math.isinf(size):
        return significant(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1000 or unit == "TiB":
            return f"{significant(size) if size % 1 or size >= 1000 else f'{size:.0f}'}{NBSP}{unit}"
        size /= 1024
    raise AssertionError("unreachable")


def times(ratio: float) -> str:
    """Format a ratio for a sentence: 6.1 times, 23 times."""
    return f"{significant(ratio, 2)} times"


def shorten(text: str, limit: int) -> str:
    """Shorten a long label in its middle, where module paths and file names differ least."""
    if len(text) <= limit:
        return text
    head = (limit - 1) // 3
    return f"{text[:head]}…{text[len(text) - (limit - 1 - head) :]}"


def printable(text: Any) -> str:
    """Return `text` on one line and without control characters, which neither SVG nor HTML may carry."""
    flat = " ".join(str(text).split())
    return "".join(char for char in flat if char.isprintable())
