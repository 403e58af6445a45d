"""Where an adapter's update lies on the spectrum of the weights that it changes."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from tqdm.auto import tqdm

from hiplora.adapters.base import BaseWeights
from hiplora.adapters.read import read_update
from hiplora.adapters.update import AdapterUpdate, model_order, module_place
from hiplora.errors import ConfigError
from hiplora.spectral import FactorStore, SpectralFactors, allocate

DEFAULT_RANK = 32


def inspect_adapter(
    adapter_dir: str | os.PathLike | AdapterUpdate, base: str | None = None, rank: int | None = None
) -> dict[str, Any]:
    """Measure how an adapter's update lies on the singular directions of its base weights.

    Args:
        adapter_dir: an adapter folder that `read_update` reads, or an update.
        base: base model, path or name, instead of the one in the configuration.
        rank: number of leading directions, at most all of a weight; None takes the adapter's principal rank, or 32.

    Returns:
        the inspection record, schema 1: adapter, base, method, rows per module (see `allocation_rows`), and a summary
        of all modules (`energy_shares`, and the largest leak).

    Raises:
        AdapterError: the adapter cannot be read or does not fit the base model.
        ConfigError: `rank` is not positive.
    """
    update = read_update(adapter_dir, base)
    rows = allocation_rows(update, base, rank)
    leaks = [row["leak"] for row in rows if row["leak"] is not None]
    return {
        "schema": 1,
        "kind": "inspection",
        "adapter": update.source,
        "base": base or update.base,
        "method": update.kind,
        "principal_rank": _rank(update, rank),
        "modules": rows,
        "summary": {**energy_shares(rows), "max_leak": max(leaks, default=None)},
    }


@torch.no_grad()
def allocation_rows(
    adapter_dir: str | os.PathLike | AdapterUpdate, base: str | None = None, rank: int | None = None
) -> list[dict[str, Any]]:
    """Return one row per adapted module, in the model's order; arguments and errors are those of `inspect_adapter`.

    A row has: module, layer (index or None), type, rank (of the directions looked at), norm (‖ΔW‖_F), left, right,
    both (fractions of ‖ΔW‖_F² inside span(U), span(V), both), sigma, gains (diag(UᵀΔWV), the change of each σ) and
    leak (of a HiP-LoRA residual channel into its own protected directions; None without such a promise).
    """
    update = read_update(adapter_dir, base)
    spectrum = _spectrum(update, base or update.base, _rank(update, rank))
    rows = []
    for module in tqdm(sorted(update.factors, key=model_order), "inspecting modules", disable=None, delay=2):
        (A, B), channels, factors = update.factors[module], update.channels.get(module), spectrum(module)
        found = allocate(B, A, factors.U, factors.V)
        row = {
            **module_place(module),
            "rank": factors.rank,
            **{name: getattr(found, name) for name in ("norm", "left", "right", "both")},
            "sigma": factors.sigma.tolist(),
            "gains": found.gains.tolist(),
            "leak": channels.leak() if channels is not None and channels.leak_limit is not None else None,
        }
        rows.append(row)
    return rows


def energy_shares(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the fractions left, right and both of some rows, weighted by energy, and the norm of them all."""
    energy = sum(row["norm"] ** 2 for row in rows)
    sums = {side: sum(row[side] * row["norm"] ** 2 for row in rows) for side in ("left", "right", "both")}
    shares = {side: total / energy if energy else 0.0 for side, total in sums.items()}
    return {**shares, "norm": math.sqrt(energy)}


def _spectrum(update: AdapterUpdate, base: str, rank: int) -> Callable[[str], SpectralFactors]:
    """Return a function for the leading singular triplets of a base weight, the adapter's own if it has just these."""
    weights, store = cache(lambda: BaseWeights(base)), FactorStore()
    own_basis = update.config.get("basis", "weight") == "weight"

    def factors(module: str) -> SpectralFactors:
        channels = update.channels.get(module)
        if channels is not None and own_basis and channels.sigma.shape[0] == rank:
            return SpectralFactors(channels.U, channels.sigma, channels.V, math.nan, math.nan, "adapter")
        weight = weights().fitting_weight(module, update)
        return store.get_or_compute(weight, min(rank, *weight.shape), name=module)

    return factors


def _rank(update: AdapterUpdate, rank: int | None) -> int:
    if rank is None:
        own = update.config.get("principal_rank")
        return own if isinstance(own, int) else DEFAULT_RANK
    if rank < 1:
        raise ConfigError(f"rank is {rank}; expected an integer of at least 1")
    return rank
