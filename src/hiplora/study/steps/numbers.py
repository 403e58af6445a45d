"""Numbers as records keep them: short."""

from collections.abc import Mapping
from typing import Any

DIGITS = 6


def rounded(value: Any) -> Any:
    """Return JSON values with every float rounded to six significant digits; tuples become lists."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(inner) for inner in value]
    return value
