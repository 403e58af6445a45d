"""AlphaEdit's updates as an adapter folder: a sum of e edits has rank e at most, so thin factors hold it."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from hiplora.adapters import AdapterUpdate, compare_modules, read_update, refuse_over, write_lora
from hiplora.errors import AdapterError

_LOST = 1e-6  # share of an update's norm that its factors may lack
_TOLERANCE = 1e-5  # the same of the factors as written


def save_update(updates: Mapping[str, Float[Tensor, "m n"]], folder: str | os.PathLike, base: str) -> None:
    """Write weight updates as a plain LoRA adapter, exact to fp32 rounding, that stock PEFT and hiplora load.

    Args:
        updates: what is added to the weight of each module, by module name.
        folder: where to write; made if need be.
        base: name or folder of the base model.

    Raises:
        AdapterError: there is no update, one is zero or not finite, or what was written differs from it.
    """
    if not updates:
        raise AdapterError("there is no update to save; edit the model first")
    factors = {name: _factors(delta, name) for name, delta in updates.items()}
    config = {"target_modules": sorted(updates), "task_type": "CAUSAL_LM"}
    update = AdapterUpdate(base, "lora", config, factors, source="AlphaEdit's updates")
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_lora(update, Path(folder))
    refuse_over(compare_modules(update, read_update(folder)), _TOLERANCE)


def _factors(delta: Float[Tensor, "m n"], name: str) -> tuple[Tensor, Tensor]:
    """`(A, B)` with BA = Δ, of the least rank that loses no more than rounding does."""
    if not torch.isfinite(delta).all() or not delta.any():
        raise AdapterError(f"layer {name}: its update is zero or not finite; nothing can be saved")
    U, sigma, Vh = torch.linalg.svd(delta.double().cpu(), full_matrices=False)
    lost = sigma.square().flip(0).cumsum(0).flip(0).sqrt() / sigma.norm()
    rank = max(1, int((lost > _LOST).sum()))
    root = sigma[:rank].sqrt()
    return (root[:, None] * Vh[:rank]).float(), (U[:, :rank] * root).float()
