"""Read any adapter that is a sum of low-rank updates: HiP-LoRA, Proj-LoRA, AdaLoRA, OSF, LoRA and what saves so."""

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hiplora.adapters.adalora import adalora_update, kept_pattern
from hiplora.adapters.adapter import AdapterUpdate
from hiplora.adapters.folder import PREFIX, check_finite, read_folder
from hiplora.adapters.hip import hip_update, live_hip_update
from hiplora.adapters.osf import live_osf_update, osf_update
from hiplora.adapters.stock import stock_update
from hiplora.errors import AdapterError


def read_update(adapter_dir: str | os.PathLike | AdapterUpdate, base: str | None = None) -> AdapterUpdate:
    """Read an adapter folder as the update it makes to its base model.

    Args:
        adapter_dir: a folder written by `save_pretrained`, HiP-LoRA, AdaLoRA, OSF or stock LoRA (PiSSA and the like as
            the difference that PEFT saves); an `AdapterUpdate` is returned as it is.
        base: base model, path or name, where the one in the configuration is not to be used. Only read for
            HiP-LoRA adapters saved without their factors, and for OSF.

    Raises:
        AdapterError: the folder is damaged, its method is not a plain update, or a weight of the base model is
            not the one that the adapter was made for; the message names the file and tensor, and the way out.
    """
    if isinstance(adapter_dir, AdapterUpdate):
        return adapter_dir
    config, tensors = read_folder(adapter_dir)
    source = str(adapter_dir)
    name = base or config.get("base_model_name_or_path") or ""
    kind = config["peft_type"]
    if kind == "HIPLORA":
        return hip_update(config, tensors, source, name)
    if kind == "LORA":
        return stock_update(config, tensors, source, name)
    if kind == "ADALORA":
        return adalora_update(config, tensors, source, name)
    if kind == "OSF":
        return osf_update(config, tensors, source, name)
    raise AdapterError(
        f"{source}: an adapter of type {kind} is not read as a plain update; "
        "train it as LoRA, AdaLoRA, OSF or HiP-LoRA, or convert it first with peft.save_as_lora"
    )


def update_from_model(model: nn.Module, adapter: str = "default") -> AdapterUpdate:
    """Read a live PEFT model's adapter as the update it makes; the model is left as it is.

    Raises:
        AdapterError: there is no such adapter, it is not a plain update, or it has NaN or Inf.
    """
    configs: Mapping[str, Any] = getattr(model, "peft_config", {})
    if adapter not in configs:
        known = ", ".join(map(repr, configs)) or "none"
        raise AdapterError(f"the model has no adapter named {adapter!r} (it has: {known}); pass adapter=…")
    config = configs[adapter]
    source, name = f"adapter {adapter!r}", config.base_model_name_or_path or ""
    state = _live_state(model, adapter)
    if config.peft_type == "HIPLORA":
        return live_hip_update(model, adapter, _plain(config.to_dict()), state, source, name)
    if config.peft_type == "LORA":
        return stock_update(_plain(config.to_dict()), state, source, name)
    if config.peft_type == "ADALORA":
        return adalora_update(_plain(config.to_dict()), state, source, name)
    if config.peft_type == "OSF":
        return live_osf_update(model, adapter, _plain(config.to_dict()), state, source, name)
    raise AdapterError(
        f"{source}: a {config.peft_type} adapter is not read as a plain update; convert it to LoRA first"
    )


def _live_state(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    for name, value in model.named_parameters():
        if adapter in name.split("."):
            check_finite(value.detach(), f"adapter {adapter!r}: tensor {name}")
    with kept_pattern(model, adapter):
        state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return {name.removeprefix(PREFIX): value.detach().cpu() for name, value in state.items()}


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration as it would be read back from JSON: sets become sorted lists, enums strings."""
    plain: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, (set, frozenset)):
            value = sorted(value)
        plain[key] = getattr(value, "value", value)
    return plain
