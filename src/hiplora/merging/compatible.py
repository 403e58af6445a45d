"""Which adapters may be merged, and what of their configurations holds for the merge."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hiplora.adapters import SELECTION, AdapterUpdate, BaseWeights
from hiplora.errors import AdapterError


def check_compatible(updates: Sequence[AdapterUpdate], base: str | None) -> None:
    """Refuse adapters that cannot be merged: of other base weights, or that replace whole modules.

    With `base`, every adapter is compared with that model's weights; else with each other, by shapes, fingerprints
    and, where they share none, the names of their base models.

    Raises:
        AdapterError: naming the adapters, the layer and the way out.
    """
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
    _check_shapes(updates)
    _check_bases(updates)


def merged_config(updates: Sequence[AdapterUpdate]) -> dict[str, Any]:
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


def _check_shapes(updates: Sequence[AdapterUpdate]) -> None:
    shapes: dict[str, tuple[tuple[int, int], AdapterUpdate]] = {}
    for update in updates:
        for module, (A, B) in update.factors.items():
            shape, other = shapes.setdefault(module, ((B.shape[0], A.shape[1]), update))
            if shape != (B.shape[0], A.shape[1]):
                raise AdapterError(_different(module, other, update))


def _check_bases(updates: Sequence[AdapterUpdate]) -> None:
    prints: dict[str, tuple[str, AdapterUpdate]] = {}
    for update in updates:
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
