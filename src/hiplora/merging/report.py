"""The report of a merge as one record: every module's conflicts, the pairs of adapters, what conflicts most."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from hiplora.adapters import WEIGHTS, AdapterUpdate
from hiplora.merging.conflict import ModuleConflict, PairConflict, conflicts
from hiplora.merging.subspaces import RANK_TOLERANCE
from hiplora.provenance import file_sha256, provenance

SHOWN = 10
_NO_WRAP: Callable[[Iterable[str]], Iterable[str]] = iter


def merge_report(
    updates: Sequence[AdapterUpdate],
    weights: Sequence[float],
    merged: Mapping[str, Any],
    *,
    wrap: Callable[[Iterable[str]], Iterable[str]] = _NO_WRAP,
) -> dict[str, Any]:
    """Measure how adapters go together, and return the report as a JSON-ready record, schema 1.

    It looks at the weighted updates as they come, before a merge rule drops anything from them.

    Args:
        updates: the updates that were merged (`hiplora.adapters.read_update`), at least one.
        weights: one finite number each.
        merged: the record of the merge, kept as it is under `merge`.
        wrap: called with the module names, yields them; for a progress bar.

    Returns:
        `adapters` (name, weight, method, modules, source, sha256 of the weights where it is a folder), `modules` (see
        `ModuleConflict.to_json`), `most_conflicting` (up to ten module names, worst first), `pairs` (matrices of the
        means over the modules that both change: left, right, cosine, and modules, their number; None where there is
        none, and on the diagonal), `totals`, `settings`, `merge`, `provenance`.

    Raises:
        ConfigError, AdapterError: as `hiplora.merging.conflict.conflicts`.
    """
    rows = conflicts(updates, weights, wrap=wrap)
    return {
        "schema": 1,
        "kind": "merge-report",
        "base": updates[0].base,
        "adapters": [
            {
                "name": name,
                "weight": float(weight),
                "method": update.kind,
                "modules": len(update.factors),
                "source": update.source,
                "sha256": _sha256(update.source),
            }
            for name, weight, update in zip(adapter_names(updates), weights, updates, strict=True)
        ],
        "modules": [row.to_json() for row in rows],
        "most_conflicting": [row.module for row in most_conflicting(rows)],
        "pairs": _matrices([pair for row in rows for pair in row.pairs], len(updates)),
        "totals": totals(rows),
        "settings": {"rank_tolerance": RANK_TOLERANCE},
        "merge": dict(merged),
        "provenance": provenance(),
    }


def most_conflicting(rows: Sequence[ModuleConflict], count: int = SHOWN) -> list[ModuleConflict]:
    """Return the modules with the highest scores, worst first; those without a score, or of 0, are no conflict."""
    scored = [(worst.score, row) for row in rows if (worst := row.worst) is not None and worst.score]
    return [row for _, row in sorted(scored, key=lambda item: -item[0])[:count]]


def totals(rows: Sequence[ModuleConflict]) -> dict[str, Any]:
    """Return the numbers of all modules together.

    Overlaps (`left`, `right`, with what chance gives) and `cosine` are means over all pairs of all modules. Norms are
    of all modules as one long vector, magnitudes are summed; `unrelated` and `unrelated_sign_conflict` are what
    unrelated updates of these sizes would give. None where there is nothing to compare. `shared` counts the modules
    that two or more adapters change.
    """
    pairs = [pair for row in rows for pair in row.pairs]
    sides = {side: [found for pair in pairs if (found := getattr(pair, side))] for side in ("left", "right")}
    means = {side: _mean(found.mean for found in sides[side]) for side in sides}
    chances = {f"{side}_chance": _mean(found.chance for found in sides[side]) for side in sides}
    magnitude = sum(row.magnitude for row in rows)
    expected = sum(row.magnitude * (1 - row.unrelated) for row in rows if row.unrelated is not None)
    return {
        "modules": len(rows),
        "shared": sum(row.worst is not None for row in rows),
        **means,
        **chances,
        "cosine": _mean(pair.cosine for pair in pairs),
        **_norms(rows),
        "sign_conflict": sum(row.cancelled for row in rows) / magnitude if magnitude else None,
        "unrelated_sign_conflict": expected / magnitude if magnitude else None,
    }


def adapter_names(updates: Sequence[AdapterUpdate]) -> list[str]:
    """Return a distinct name for each adapter: its folder's own name, the whole source, or either with a number."""
    sources = [update.source for update in updates]
    short = [Path(source).resolve().name if Path(source).is_dir() else source for source in sources]
    chosen = short if len(set(short)) == len(set(sources)) else sources
    counts = Counter(chosen)
    return [
        f"{name} ({chosen[: place + 1].count(name)})" if counts[name] > 1 else name
        for place, name in enumerate(chosen)
    ]


def _norms(rows: Sequence[ModuleConflict]) -> dict[str, float | None]:
    squares: dict[int, float] = defaultdict(float)
    for row in rows:
        for place, norm in zip(row.adapters, row.norms, strict=True):
            squares[place] += norm**2
    norms = [math.sqrt(square) for square in squares.values()]
    total = sum(norms)
    if not total:
        return {"norm_ratio": None, "unrelated": None}
    return {
        "norm_ratio": math.hypot(*(row.sum_norm for row in rows)) / total,
        "unrelated": math.hypot(*norms) / total,
    }


def _matrices(pairs: Sequence[PairConflict], count: int) -> dict[str, list[list[float | None]]]:
    matrices: dict[str, list[list[float | None]]] = {
        name: [[None] * count for _ in range(count)] for name in ("left", "right", "cosine", "modules")
    }
    for i, j in combinations(range(count), 2):
        known = [pair for pair in pairs if pair.adapters == (i, j) and pair.cosine is not None]
        values = {
            "left": _mean(pair.left.mean for pair in known if pair.left),
            "right": _mean(pair.right.mean for pair in known if pair.right),
            "cosine": _mean(pair.cosine for pair in known),
            "modules": len(known),
        }
        for name, value in values.items():
            matrices[name][i][j] = matrices[name][j][i] = value
    return matrices


def _mean(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return fmean(present) if present else None


def _sha256(source: str) -> str | None:
    file = Path(source) / WEIGHTS
    return file_sha256(file) if file.is_file() else None
