"""AdaLoRA adapters as plain updates: `ΔW = s · B diag(e) A`, ranks that were pruned left out."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hiplora.adapters.adapter import AdapterUpdate, Pair
from hiplora.adapters.stock import check_extras, check_plain, sort_tensors
from hiplora.errors import AdapterError

_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<part>[ABE])$")
_DEFAULT_RANK = 12  # of peft.AdaLoraConfig
_SMALL = 1e-5  # what peft.tuners.adalora adds to the rank that it divides by


def adalora_update(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str, base: str
) -> AdapterUpdate:
    """Return an AdaLoRA adapter as an update, its singular values and scaling baked into the factors.

    PEFT scales by `lora_alpha / (init_r + 1e-5)`, whatever is left of the rank after pruning. A module that lost all
    of its rank gets a zero update of rank 1.

    Args:
        config: as in `adapter_config.json`.
        tensors: by name, without PEFT's prefix.
        source: what to call the adapter in messages.
        base: name of the base model.

    Raises:
        AdapterError: not a plain low-rank update, or a tensor is missing or has the wrong shape.
    """
    check_plain(config, source)
    found, extras = sort_tensors(tensors, _FACTOR)
    check_extras(extras, config, source)
    factors = {module: _pair(module, parts, config, source) for module, parts in sorted(found.items())}
    if not factors:
        raise AdapterError(
            f"{source}: no lora_A, lora_B and lora_E tensors in it; nothing was adapted or saved"
        )
    return AdapterUpdate(base, "adalora", dict(config), factors, {}, extras, {}, source)


@contextmanager
def kept_pattern(model: nn.Module, adapter: str) -> Iterator[None]:
    """Put a live adapter's `rank_pattern` back: PEFT renames its keys when it returns an AdaLoRA adapter's tensors."""
    config: Any = model.peft_config[adapter]  # type: ignore[index]
    if config.peft_type != "ADALORA":
        yield
        return
    before = config.rank_pattern
    try:
        yield
    finally:
        config.rank_pattern = before


def _pair(module: str, parts: Mapping[str, Tensor], config: Mapping[str, Any], source: str) -> Pair:
    for factor in "ABE":
        if factor not in parts:
            raise AdapterError(
                f"{source}: tensor {module}.lora_{factor} is missing; the adapter was not saved completely"
            )
    A, B, E = parts["A"].float(), parts["B"].float(), parts["E"].float().reshape(-1, 1)
    if A.dim() != 2 or B.dim() != 2 or not A.shape[0] == B.shape[1] == E.shape[0]:
        raise AdapterError(
            f"{source}: layer {module}: lora_A {tuple(A.shape)}, lora_B {tuple(B.shape)} and lora_E "
            f"{tuple(parts['E'].shape)} are not factors of a linear layer; the file is damaged"
        )
    started, r = config.get("init_r", _DEFAULT_RANK), A.shape[0]
    _check_rank(module, r, started, config, source)
    if r == 0:
        return torch.zeros(1, A.shape[1]), torch.zeros(B.shape[0], 1)
    alpha = config.get("lora_alpha") or 0
    scaling = (alpha if alpha > 0 else r) / (started + _SMALL)
    return A * E, scaling * B


def _check_rank(module: str, found: int, started: int, config: Mapping[str, Any], source: str) -> None:
    expected = started
    for name, kept in (config.get("rank_pattern") or {}).items():
        if name.partition(".lora_E")[0] == module:
            expected = sum(kept)
    if found != expected:
        raise AdapterError(
            f"{source}: layer {module}: rank {found}, but the configuration says {expected}; the configuration and "
            "the weights are of different adapters"
        )
