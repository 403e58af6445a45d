"""Measure where merged adapters conflict, per module, in factor space, on the weighted updates before a rule acts."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from hiplora.adapters import WEIGHTS, AdapterUpdate, Pair, model_order, module_place
from hiplora.merging.thin import thin_svd
from hiplora.provenance import file_sha256, provenance
from hiplora.spectral import full_precision

# A direction with less than this share of the largest singular value is not counted: a millionth of its energy.
RANK_TOLERANCE = 1e-3
# An update this far below its factors is what rounding left of terms that cancel: zero, as with B = 0.
_ROUNDING = torch.finfo(torch.float32).eps
_CHUNK = 1 << 18  # entries of a dense update that are in memory at a time
Record = dict[str, Any]


def compress(factors: Sequence[Pair]) -> list[Pair]:
    """Return the updates in coordinates of what they span together: small factors with the same geometry, float64.

    `ΔW_t = Q_L (B'_t A'_t) Q_Rᵀ` with orthonormal `Q_L`, `Q_R` that are never formed: `B'_t` and `A'_tᵀ` are blocks of
    the triangular factors of all `B_t` side by side and all `A_tᵀ` side by side.
    """
    ranks = [A.shape[0] for A, _ in factors]
    left = torch.linalg.qr(torch.cat([B for _, B in factors], dim=1).double(), mode="r").R
    right = torch.linalg.qr(torch.cat([A for A, _ in factors]).double().T, mode="r").R
    return [(R.T, L) for L, R in zip(left.split(ranks, dim=1), right.split(ranks, dim=1), strict=True)]


def spaces(factors: Pair) -> tuple[Float[Tensor, "m r"], Float[Tensor, "n r"], float]:
    """Return orthonormal bases of an update's column space (outputs) and row space (inputs), and ‖ΔW‖_F; float64.

    r is the number of singular values above `RANK_TOLERANCE` of the largest; 0 for a zero update.
    """
    U, sigma, V = thin_svd(factors)
    A, B = factors
    sigma = sigma * (sigma[:1] > _ROUNDING * B.norm() * A.norm())
    rank = int((sigma > RANK_TOLERANCE * sigma[:1]).sum())
    return U[:, :rank], V[:, :rank], sigma.norm().item()


def overlap(P: Float[Tensor, "s p"], Q: Float[Tensor, "s q"], dimensions: int) -> dict[str, float]:
    """Return how much the spans of two orthonormal bases share, in a space of n `dimensions`.

    `mean` is the mean squared cosine of their principal angles, `Σ_i cos²θ_i / min(p, q)` (Björck and Golub 1973; Hu et
    al. 2021, Eq. 4): 0 where they are orthogonal, 1 where the smaller one lies in the other. `chance` is the mean that
    random subspaces have: `max(p, q) / n`.
    """
    cosines = torch.linalg.svdvals(P.T @ Q).clamp_max(1.0)
    return {"mean": cosines.square().mean().item(), "chance": max(P.shape[1], Q.shape[1]) / dimensions}


def cancelled(factors: Sequence[Pair]) -> tuple[float, float]:
    """Return how much magnitude cancels in the sum, `Σ_t ‖ΔW_t‖₁ − ‖Σ_t ΔW_t‖₁`, and `Σ_t ‖ΔW_t‖₁`.

    An entry loses twice what opposes the sign that TIES-Merging would elect there (Yadav et al. 2023).
    """
    rows = max(1, _CHUNK // factors[0][0].shape[1])
    before = after = 0.0
    for start in range(0, factors[0][1].shape[0], rows):
        total = torch.zeros(())
        for A, B in factors:
            part = B[start : start + rows] @ A
            total = total + part
            before += part.abs_().sum(dtype=torch.float64).item()
        after += total.abs_().sum(dtype=torch.float64).item()
    return max(0.0, before - after), before


def conflicts(updates: Sequence[AdapterUpdate], weights: Sequence[float]) -> list[Record]:
    """Measure how the weighted updates of several adapters go together: a record a module, in the model's order.

    The adapters must fit together, as `merge` checks. A record compares those (`adapters`, their indices from 0) that
    adapt the module: their `norms`; `sum_norm` = ‖Σ_t w_t ΔW_t‖_F; `norm_ratio`, the norm of the sum over the sum of
    the norms (1 where all agree, 0 where all is lost), beside `unrelated`, what orthogonal updates of these norms have;
    `magnitude` and `sign_conflict`, the share of it that cancels entry by entry; `pairs`, each with the overlap of what
    they write (`left`) and read (`right`), `cosine` and `score` = `√(left · right) · (1 − cosine) / 2` (0: they do not
    overlap, or agree; 1/2: unrelated in the same directions; 1: opposite), without pairs that have a zero update;
    `score`, the largest of the pairs. A value is None where it is not defined, as for zero updates.
    """
    modules = sorted({module for update in updates for module in update.factors}, key=model_order)
    with full_precision(torch.device("cpu")):
        return [_conflict(module, updates, weights) for module in tqdm(modules, "conflicts", disable=None, delay=2)]


def _conflict(module: str, updates: Sequence[AdapterUpdate], weights: Sequence[float]) -> Record:
    adapters = [index for index, update in enumerate(updates) if module in update.factors]
    factors = []
    for index in adapters:
        A, B = updates[index].factors[module]
        factors.append((A.detach().float(), weights[index] * B.detach().float()))
    (m, n), compressed = updates[adapters[0]].shape(module), compress(factors)
    spans = [spaces(pair) for pair in compressed]
    norms = [norm for _, _, norm in spans]
    total = sum(norms)
    sum_norm = (torch.cat([B for _, B in compressed], dim=1) @ torch.cat([A for A, _ in compressed])).norm().item()
    lost, magnitude = cancelled(factors)
    pairs: list[Record] = []
    for i, j in combinations(range(len(adapters)), 2):
        if norms[i] and norms[j]:
            left, right = overlap(spans[i][0], spans[j][0], m), overlap(spans[i][1], spans[j][1], n)
            (A, B), (A_other, B_other) = compressed[i], compressed[j]
            inner = ((B.T @ B_other) * (A @ A_other.T)).sum().item()
            cosine = max(-1.0, min(1.0, inner / (norms[i] * norms[j])))
            score = math.sqrt(left["mean"] * right["mean"]) * (1 - cosine) / 2
            pair = [adapters[i], adapters[j]]
            pairs.append({"adapters": pair, "left": left, "right": right, "cosine": cosine, "score": score})
    return {
        **module_place(module),
        "adapters": adapters,
        "norms": norms,
        "sum_norm": sum_norm,
        "norm_ratio": _share(sum_norm, total),
        "unrelated": _share(math.hypot(*norms), total),
        "magnitude": magnitude,
        "sign_conflict": _share(lost, magnitude),
        "pairs": pairs,
        "score": max((pair["score"] for pair in pairs), default=None),
    }


def merge_report(updates: Mapping[str, AdapterUpdate], weights: Sequence[float], merged: Mapping[str, Any]) -> Record:
    """Return how adapters, by name, go together, as a JSON-ready record (schema 1, kind `merge-report`).

    It has `adapters`, `modules` (see `conflicts`), `most_conflicting` (up to ten module names, worst first), `cosine`
    (the matrix of the means over the modules that both change), `totals`, and `merge`, the record of the merge.
    """
    rows = conflicts(list(updates.values()), weights)
    scored = sorted((row for row in rows if row["score"]), key=lambda row: -row["score"])
    pairs = [pair for row in rows for pair in row["pairs"]]

    def cosine(*adapters: int) -> float | None:
        return _mean(pair["cosine"] for pair in pairs if pair["adapters"] == sorted(adapters))

    return {
        "schema": 1,
        "kind": "merge-report",
        "base": next(iter(updates.values())).base,
        "adapters": [
            {
                "name": name,
                "weight": float(weight),
                "method": update.kind,
                "modules": len(update.factors),
                "source": update.source,
                "sha256": file_sha256(file) if (file := Path(update.source) / WEIGHTS).is_file() else None,
            }
            for weight, (name, update) in zip(weights, updates.items(), strict=True)
        ],
        "modules": rows,
        "most_conflicting": [row["module"] for row in scored[:10]],
        "cosine": [[cosine(i, j) for j in range(len(updates))] for i in range(len(updates))],
        "totals": totals(rows),
        "merge": dict(merged),
        "provenance": provenance(),
    }


def totals(rows: Sequence[Record]) -> Record:
    """Return the numbers of all modules together.

    Overlaps and `cosine` are means over all pairs of all modules, norms of all modules as one long vector; `unrelated`
    is what unrelated updates of these sizes would give. `shared` counts the modules that two or more adapters change.
    """
    pairs = [pair for row in rows for pair in row["pairs"]]
    norms_of: dict[int, list[float]] = {}
    for row in rows:
        for adapter, norm in zip(row["adapters"], row["norms"], strict=True):
            norms_of.setdefault(adapter, []).append(norm)
    norms = [math.hypot(*values) for values in norms_of.values()]
    total, magnitude = sum(norms), sum(row["magnitude"] for row in rows)
    cancelling = sum(row["magnitude"] * (row["sign_conflict"] or 0.0) for row in rows)
    return {
        "modules": len(rows),
        "shared": sum(bool(row["pairs"]) for row in rows),
        **{side: _mean(pair[side]["mean"] for pair in pairs) for side in ("left", "right")},
        **{f"{side}_chance": _mean(pair[side]["chance"] for pair in pairs) for side in ("left", "right")},
        "cosine": _mean(pair["cosine"] for pair in pairs),
        "norm_ratio": _share(math.hypot(*(row["sum_norm"] for row in rows)), total),
        "unrelated": _share(math.hypot(*norms), total),
        "sign_conflict": _share(cancelling, magnitude),
    }


def _mean(values: Iterable[float]) -> float | None:
    present = list(values)
    return fmean(present) if present else None


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
