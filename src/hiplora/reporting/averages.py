"""Averages that compare like with like: over the texts and sets that every method was measured on."""

from collections.abc import Callable, Mapping, Sequence

from hiplora.reporting.numbers import geometric_mean, mean
from hiplora.reporting.results import Drift

Drifts = Mapping[str, Sequence[Drift]]


def mean_kl(drifts: Drifts) -> dict[str, float | None]:
    """Return each method's mean KL divergence over the texts that all methods with a drift have."""
    rows = _common(drifts, lambda row: row.kl)
    return {name: mean(row.kl for row in found) for name, found in rows.items()}


def mean_perplexity_ratio(drifts: Drifts) -> dict[str, float | None]:
    """Return each method's geometric mean perplexity ratio over the texts that all methods with a drift have."""
    rows = _common(drifts, lambda row: row.perplexity_ratio)
    return {name: geometric_mean(row.perplexity_ratio for row in found) for name, found in rows.items()}


def common_texts(drifts: Drifts, get: Callable[[Drift], float | None]) -> list[str]:
    """Return the texts for which every method that has any drift has this value, in the first one's order."""
    measured = [[row.text for row in rows if get(row) is not None] for rows in drifts.values() if rows]
    return [text for text in measured[0] if all(text in other for other in measured[1:])] if measured else []


def mean_success(success: Mapping[str, float | None], counts: Mapping[str, float | None]) -> float | None:
    """Return the mean success over the sets, weighted by their number of edits; None if a set's is missing."""
    values = [(value, counts.get(name) or 1.0) for name, value in success.items() if value is not None]
    if not values or len(values) < len(success):
        return None
    return sum(value * weight for value, weight in values) / sum(weight for _, weight in values)


def _common(drifts: Drifts, get: Callable[[Drift], float | None]) -> dict[str, list[Drift]]:
    texts = common_texts(drifts, get)
    return {name: [row for row in rows if row.text in texts] for name, rows in drifts.items()}
