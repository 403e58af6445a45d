"""Merge adapters that change the same base model."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hiplora.errors import AdapterError, ConfigError
from hiplora.export.adapter import AdapterUpdate, Channels, Pair
from hiplora.export.base_weights import BaseWeights
from hiplora.export.lora import SELECTION, ExportReport, save_as_lora
from hiplora.export.update import read_update
from hiplora.merging.registry import rule
from hiplora.merging.term import Term

Adapter = str | os.PathLike | AdapterUpdate


def merge(
    adapter_dirs: Sequence[Adapter],
    method: str = "addition",
    weights: Sequence[float] | None = None,
    *,
    base: str | None = None,
) -> AdapterUpdate:
    """Merge adapters of one base model into one update.

    HiP-LoRA, Proj-LoRA and plain LoRA adapters of any ranks, scalings and targets go together; a module that an
    adapter does not adapt gets nothing from it.

    Args:
        adapter_dirs: adapter folders or updates, at least one.
        method: name of a rule in `RULES`.
        weights: one finite number per adapter, negative ones included; 1 each if None.
        base: base model, path or name, that all adapters are taken to be for; the fingerprints in them are then
            compared with its weights. None requires that they name the same one, or agree on fingerprints.

    Raises:
        AdapterError: an adapter cannot be read, leaks, replaces whole modules, or is for another base model.
        ConfigError: unknown rule, no adapters, or weights of the wrong number or not finite.
    """
    chosen = rule(method)
    numbers = _check_weights(weights, len(adapter_dirs))
    updates = [read_update(adapter, base) for adapter in adapter_dirs]
    for update in updates:
        update.check_leak()
    _check_compatible(updates, base)
    factors: dict[str, Pair] = {}
    channels: dict[str, Channels] = {}
    for module in sorted({module for update in updates for module in update.factors}):
        factors[module], kept = chosen.combine(_terms(updates, numbers, module), chosen.options())
        if kept is not None:
            channels[module] = kept
    fingerprints = {module: value for update in updates for module, value in update.fingerprints.items()}
    source = f"{method} of " + ", ".join(f"{w:g} × {u.source}" for w, u in zip(numbers, updates, strict=True))
    extras = updates[0].extras if len(updates) == 1 else {}
    config = _config(updates)
    return AdapterUpdate(
        base or updates[0].base, "merged", config, factors, fingerprints, extras, channels, source
    )


def save_merged(
    update: AdapterUpdate, path: str | os.PathLike, *, overwrite: bool = False, **options: Any
) -> ExportReport:
    """Write a merged update as a plain LoRA folder, verified as any export.

    Args:
        update: what `merge` returned.
        path: output folder.
        overwrite: replace `path` if it exists.
        options: as for `hiplora.export.save_as_lora`: pad_rank, dtype, tolerance.

    Raises:
        AdapterError, ConfigError: as `hiplora.export.save_as_lora`.
    """
    return save_as_lora(update, path, overwrite=overwrite, **options)


def _check_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if count == 0:
        raise ConfigError("nothing to merge: pass at least one adapter")
    if weights is None:
        return [1.0] * count
    if len(weights) != count:
        raise ConfigError(f"weights: {len(weights)} given for {count} adapters; pass one each")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ConfigError(f"weights: {weight!r} is not a finite number")
    return [float(weight) for weight in weights]


def _terms(updates: Sequence[AdapterUpdate], weights: Sequence[float], module: str) -> list[Term]:
    return [
        Term(update.factors[module], weight, update.channels.get(module))
        for update, weight in zip(updates, weights, strict=True)
        if module in update.factors
    ]


def _check_compatible(updates: Sequence[AdapterUpdate], base: str | None) -> None:
    whole = [update for update in updates if update.extras]
    if whole and len(updates) > 1:
        raise AdapterError(
            f"{whole[0].source}: replaces whole modules ({', '.join(sorted(whole[0].extras))}), which cannot be "
            "merged with another adapter; train it without modules_to_save"
        )
    if base is not None:
        weights = BaseWeights(base)
        for update in updates:
            for module in update.factors:
                weights.fitting_weight(module, update)
        return
    shapes: dict[str, tuple[tuple[int, int], AdapterUpdate]] = {}
    prints: dict[str, tuple[str, AdapterUpdate]] = {}
    for update in updates:
        for module, (A, B) in update.factors.items():
            shape, other = shapes.setdefault(module, ((B.shape[0], A.shape[1]), update))
            if shape != (B.shape[0], A.shape[1]):
                raise AdapterError(_different(module, other, update))
        shared = [module for module in update.fingerprints if module in prints]
        if update is not updates[0] and not shared and _name(update.base) != _name(updates[0].base):
            raise AdapterError(
                f"{updates[0].source} is for base model {updates[0].base or 'unknown'}, {update.source} for "
                f"{update.base or 'unknown'}; if these are the same model, name it: pass base=…"
            )
        for module, fingerprint in update.fingerprints.items():
            known, other = prints.setdefault(module, (fingerprint, update))
            if known != fingerprint:
                raise AdapterError(_different(module, other, update))


def _different(module: str, one: AdapterUpdate, other: AdapterUpdate) -> str:
    return (
        f"layer {module}: {one.source} and {other.source} were made for different base weights (of {one.base or '?'} "
        f"and {other.base or '?'}); only adapters of one base model can be merged"
    )


def _name(base: str) -> str:
    """Return a base model's name so that two spellings of one folder agree."""
    return str(Path(base).resolve()) if base and Path(base).exists() else base


def _config(updates: Sequence[AdapterUpdate]) -> dict[str, Any]:
    """Return what of the adapters' configurations holds for the merged one."""
    first = updates[0].config
    config = {
        "peft_type": "LORA",
        "task_type": first.get("task_type"),
        "base_precision": first.get("base_precision"),
    }
    # Where all adapters select the same modules, so does the merged one; else it names them one by one.
    if all(_selection(update) == _selection(updates[0]) for update in updates):
        config |= {key: first.get(key) for key in SELECTION}
    ranks = {update.config.get("principal_rank") for update in updates}
    if len(ranks) == 1:
        config["principal_rank"] = ranks.pop()
    config |= _basis([update.config for update in updates if update.channels])
    if len(updates) == 1:
        config |= {key: first.get(key) for key in ("modules_to_save", "auto_mapping", "revision")}
    return config


def _basis(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the channels' directions are: of one basis, or else not the weights' singular directions."""
    found = {config.get("basis", "weight") for config in configs}
    alike = all(config.get("calibration") == configs[0].get("calibration") for config in configs)
    return {
        "basis": found.pop() if len(found) == 1 else ("activation" if found else "weight"),
        "calibration": (configs[0].get("calibration") if configs and alike else None) or {},
    }


def _selection(update: AdapterUpdate) -> list[Any]:
    values = (update.config.get(key) for key in SELECTION)
    return [sorted(value) if isinstance(value, (list, set)) else value for value in values]
