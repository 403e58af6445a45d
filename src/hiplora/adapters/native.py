"""Export of an update whose channels were kept apart, as a merge may be, to a HiP-LoRA adapter."""

import os
from collections.abc import Mapping
from typing import Any

import torch

from hiplora.adapters.lora import open_update, pattern, save_tensors, shared_fields, verified
from hiplora.adapters.update import AdapterUpdate, Channels
from hiplora.errors import AdapterError
from hiplora.files import staged_dir
from hiplora.tuner import HipLoraConfig


def save_as_hiplora(
    update: AdapterUpdate,
    path: str | os.PathLike,
    *,
    overwrite: bool = False,
    details: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write an update as a HiP-LoRA adapter, verify it, and return its record; arguments as of `save_as_lora`.

    Raises:
        AdapterError: a module has no channels of one basis, as all have in a merge of adapters that share it, left its
            complement, or protects other sides than the rest; or the result differs. Nothing is written then.
        ConfigError: `path` exists.
    """
    update = open_update(update, path, overwrite)
    channels = _channels(update)
    config = _config(update, channels)
    with staged_dir(path, overwrite) as staged:
        tensors: dict[str, torch.Tensor] = {}
        for module, found in channels.items():
            parts = {name: getattr(found, name) for name in ("A", "B", "U", "sigma", "V")}
            if config.principal_channel:  # the gains of a module without them are zero
                parts["delta"] = torch.zeros_like(found.sigma) if found.delta is None else found.delta
            names = {part: f"{part}.weight" if part in ("A", "B", "delta") else part for part in parts}
            tensors |= {f"{module}.hiplora_{names[part]}": tensor for part, tensor in parts.items()}
        save_tensors(tensors | dict(update.extras), staged)
        config.save_pretrained(str(staged))
        return verified("hiplora", update, staged, path, "float32", True, details)


def _channels(update: AdapterUpdate) -> dict[str, Channels]:
    """Return the channels of every module, checked to be of one kind."""
    sides = next((found.sides for found in update.channels.values()), "")
    for module in update.factors:
        found, why = update.channels.get(module), "has no two channels in one basis there"
        if found is not None:
            why = f"protects the sides {found.sides!r} there, but {sides!r} elsewhere"
        if found is None or found.sides != sides:
            raise AdapterError(
                f"layer {module}: {update.source} {why}, so it is no HiP-LoRA adapter; save it as plain LoRA, which is "
                "as exact"
            )
    return dict(update.channels)


def _config(update: AdapterUpdate, channels: Mapping[str, Channels]) -> HipLoraConfig:
    r, rank_pattern = pattern({module: c.A.shape[0] for module, c in channels.items()})
    alpha, alpha_pattern = pattern({module: c.scaling * c.A.shape[0] for module, c in channels.items()})
    k, principal_rank_pattern = pattern({module: len(c.sigma) for module, c in channels.items()})
    projected = all(c.leak_limit is not None for c in channels.values())
    gains = any(c.delta is not None for c in channels.values())
    return HipLoraConfig(
        r=r,
        lora_alpha=alpha,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        principal_rank=k,
        principal_rank_pattern=principal_rank_pattern,
        residual_projection=projected,
        principal_channel=gains or not projected,
        basis=update.config.get("basis", "weight"),
        basis_sides=next(iter(channels.values())).sides,
        fingerprints=dict(update.fingerprints),
        base_precision=update.config.get("base_precision") or "",
        calibration=dict(update.config.get("calibration") or {}),
        **shared_fields(update),
    )
