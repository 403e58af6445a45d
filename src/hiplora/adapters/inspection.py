"""Where an adapter's update lies: on its own protected directions, or on the leading ones of the weights."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from tqdm.auto import tqdm

from hiplora.adapters.base import BaseWeights
from hiplora.adapters.read import read_update
from hiplora.adapters.update import AdapterUpdate, Channels, model_order, module_place
from hiplora.errors import ConfigError
from hiplora.spectral import FactorStore, SpectralFactors, allocate

DEFAULT_RANK = 32
_SHARES = ("left", "right", "both", "chance")


def inspect_adapter(
    adapter_dir: str | os.PathLike | AdapterUpdate, base: str | None = None, rank: int | None = None
) -> dict[str, Any]:
    """Measure how an adapter's update lies on its own protected directions or on leading singular directions.

    `base` stands for the model in the configuration. `rank` is how many leading singular directions of the base weights
    to look at; None takes those that a HiP-LoRA adapter protects, of other adapters 32 singular ones.

    Returns the record, schema 1: adapter, base, method, `directions` ("protected" or "singular"), `modules` (see
    `allocation_rows`), `summary` (`energy_shares` of all, and the largest leak) and `verdict`, a sentence. AdapterError
    if the adapter cannot be read or does not fit the base, ConfigError if `rank` is not positive.
    """
    update = read_update(adapter_dir, base)
    rows = allocation_rows(update, base, rank)
    leaks = [row["leak"] for row in rows if row["leak"] is not None]
    record = {
        "schema": 1,
        "kind": "inspection",
        "adapter": update.source,
        "base": base or update.base,
        "method": update.kind,
        "directions": "protected" if rank is None and update.channels else "singular",
        "principal_rank": max(row["rank"] for row in rows),
        "modules": rows,
        "summary": {**energy_shares(rows), "max_leak": max(leaks, default=None)},
    }
    return record | {"verdict": _verdict(record)}


@torch.no_grad()
def allocation_rows(
    adapter_dir: str | os.PathLike | AdapterUpdate, base: str | None = None, rank: int | None = None
) -> list[dict[str, Any]]:
    """Return one row per adapted module, in the model's order; arguments and errors are those of `inspect_adapter`.

    A row has: module, layer, type, rank (of the directions looked at), norm (‖ΔW‖_F), left, right, both (fractions of
    ‖ΔW‖_F² inside span(U), span(V), both), chance (what a random update has inside either), sigma, gains (diag(UᵀΔWV))
    and leak (of a HiP-LoRA residual channel into its own protected directions; None without such a promise).
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"rank is {rank}; expected an integer of at least 1")
    update = read_update(adapter_dir, base)
    weights, store = cache(lambda: BaseWeights.of(replace(update, base=base or update.base))), FactorStore()
    rows = []
    for module in tqdm(sorted(update.factors, key=model_order), "inspecting modules", disable=None, delay=2):
        (A, B), channels, (m, n) = update.factors[module], update.channels.get(module), update.shape(module)
        # In the weight basis a HiP-LoRA adapter's own directions are the singular ones.
        weight_basis = update.config.get("basis", "weight") == "weight"
        factors: Channels | SpectralFactors
        if channels is None or (rank is not None and not (weight_basis and len(channels.sigma) == rank)):
            weight = weights().weight(module, update)
            factors = store.get_or_compute(weight, min(rank or DEFAULT_RANK, m, n), name=module)
        else:
            factors = channels
        allocation, k = allocate(B, A, factors.U, factors.V), len(factors.sigma)
        row = {
            **module_place(module),
            "rank": k,
            **{name: getattr(allocation, name) for name in ("norm", "left", "right", "both")},
            "chance": 1 - (1 - k / m) * (1 - k / n),
            "sigma": factors.sigma.tolist(),
            "gains": allocation.gains.tolist(),
            "leak": channels.leak() if channels is not None and channels.leak_limit is not None else None,
        }
        rows.append(row)
    return rows


def energy_shares(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return left, right, both and chance of some rows, weighted by energy, and the norm of them all."""
    energy = sum(row["norm"] ** 2 for row in rows)
    sums = {side: sum(row[side] * row["norm"] ** 2 for row in rows) for side in _SHARES if side in rows[0]}
    shares = {side: total / energy if energy else 0.0 for side, total in sums.items()}
    return {**shares, "norm": math.sqrt(energy)}


def _verdict(record: Mapping[str, Any]) -> str:
    """Return the record in a sentence."""
    total, leak = record["summary"], record["summary"]["max_leak"]
    inside = total["left"] + total["right"] - total["both"]
    touched = f"{inside:.1%} of the update's energy touches"
    chance = f"a random update has {total['chance']:.1%} there"
    if record["directions"] == "singular":
        return f"{touched} the {record['principal_rank']} leading singular directions of each weight; {chance}."
    promise = "promises no complement" if leak is None else f"leaks {leak:.0e} at most beside its gains"
    return f"{touched} the directions that the adapter protects; {chance}. It {promise}."
