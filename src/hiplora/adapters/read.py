"""Read any adapter that is a sum of low-rank updates: HiP-LoRA, LoRA, AdaLoRA, OSF, and what PEFT converts to LoRA."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

import hiplora.tuner  # noqa: F401 - registers HiP-LoRA with PEFT
from hiplora.adapters.formats import Saved, adalora_update, lora_update, osf_update
from hiplora.adapters.hip import hip_update
from hiplora.adapters.update import AdapterUpdate
from hiplora.errors import AdapterError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_READERS: dict[str, Callable[[Saved], AdapterUpdate]] = {
    "HIPLORA": hip_update,
    "LORA": lora_update,
    "ADALORA": adalora_update,
    "OSF": osf_update,
}


def read_update(adapter_dir: str | os.PathLike | AdapterUpdate, base: str | None = None) -> AdapterUpdate:
    """Read an adapter folder as the update it makes to its base model.

    Args:
        adapter_dir: a folder written by `save_pretrained`: HiP-LoRA, LoRA, AdaLoRA or OSF (PiSSA and the like as
            the difference that PEFT saves); an `AdapterUpdate` is returned as it is.
        base: base model, path or name, instead of the one in the configuration. Only read for HiP-LoRA adapters
            saved without their factors, and for OSF.

    Raises:
        AdapterError: the folder is damaged, its method is not a plain update, or a weight of the base model is
            not the one that the adapter was made for; the message names the file and tensor, and the way out.
    """
    if isinstance(adapter_dir, AdapterUpdate):
        adapter_dir.check_low_rank()
        return adapter_dir
    config, tensors = _read_folder(Path(adapter_dir))
    return _read(Saved(config, tensors, str(adapter_dir), base or config.get("base_model_name_or_path") or ""))


def update_from_model(model: nn.Module, adapter: str = "default") -> AdapterUpdate:
    """Read a live PEFT model's adapter as the update it makes; the model is left as it is.

    Raises:
        AdapterError: there is no such adapter, it is not a plain update, or it has NaN or Inf.
    """
    configs: Mapping[str, Any] = getattr(model, "peft_config", {})
    if adapter not in configs:
        known = ", ".join(map(repr, configs)) or "none"
        raise AdapterError(f"the model has no adapter named {adapter!r} (it has: {known}); pass adapter=…")
    source = f"adapter {adapter!r}"
    for name, value in model.named_parameters():
        if adapter in name.split("."):
            check_finite(value.detach(), f"{source}: tensor {name}")
    live = configs[adapter]
    config = {key: _plain(value) for key, value in live.to_dict().items()}
    pattern = getattr(live, "rank_pattern", None)
    try:
        state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    finally:
        if pattern is not None:
            live.rank_pattern = pattern  # PEFT renames its keys when it returns an AdaLoRA adapter's tensors
    tensors = {name.removeprefix(PREFIX): value.detach().cpu() for name, value in state.items()}
    return _read(Saved(config, tensors, source, config["base_model_name_or_path"] or "", model, adapter))


def check_finite(tensor: Tensor, what: str) -> None:
    """Raise AdapterError if a tensor has NaN or Inf, naming `what` and their count."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise AdapterError(
            f"{what}: {bad} of {tensor.numel()} values are NaN or Inf; the training diverged or the file is "
            "damaged: use an earlier checkpoint"
        )


def _read(saved: Saved) -> AdapterUpdate:
    kind = saved.config["peft_type"]
    if kind not in _READERS:
        raise saved.error(
            f"an adapter of type {kind} is not read as a plain update; train it as LoRA, AdaLoRA, OSF or HiP-LoRA, "
            "or convert it first with peft.save_as_lora"
        )
    return _READERS[kind](saved)


def _plain(value: Any) -> Any:
    """Return a setting as it would be read back from JSON: sets become sorted lists, enums strings."""
    value = sorted(value) if isinstance(value, (set, frozenset)) else value
    return getattr(value, "value", value)


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return an adapter folder's configuration and its tensors, as saved, by name without PEFT's prefix."""
    if not (folder / CONFIG).is_file():
        raise AdapterError(f"{folder}: no {CONFIG} here; name the folder that `save_pretrained` wrote")
    try:
        config = json.loads((folder / CONFIG).read_text())
    except ValueError as error:
        raise AdapterError(f"{folder / CONFIG}: not valid JSON ({error}); save the adapter again") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise AdapterError(f"{folder / CONFIG}: no peft_type in it; this is not a PEFT adapter")
    pickled = folder / "adapter_model.bin"
    file = folder / WEIGHTS if (folder / WEIGHTS).is_file() or not pickled.is_file() else pickled
    if not file.is_file():
        raise AdapterError(f"{folder}: has {CONFIG} but no {WEIGHTS}; the adapter was not saved completely")
    try:
        pickle = file.suffix == ".bin"
        found = torch.load(file, map_location="cpu", weights_only=True) if pickle else load_file(file)
    except Exception as error:  # both libraries raise many types for a damaged file, none of them documented
        raise AdapterError(f"{file}: damaged or cut off ({error}); save or copy the adapter again") from error
    for name, value in found.items():
        check_finite(value, f"{file}: tensor {name.removeprefix(PREFIX)}")
    return config, {name.removeprefix(PREFIX): value for name, value in found.items()}
