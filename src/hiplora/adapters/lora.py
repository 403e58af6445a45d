"""Lossless export to an adapter: plain LoRA, or HiP-LoRA where the channels were kept apart, as a merge may do.

Plain LoRA is `A' = [Ã; Vᵀ]`, `B' = [(α/r)B̃ | U diag(δ)]`, of rank r + k and scaling 1.
"""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from hiplora.adapters.check import compare_logits, compare_modules, refuse_over, skeleton_of, stock_targets
from hiplora.adapters.folder import PREFIX, WEIGHTS, check_finite
from hiplora.adapters.output import save_tokenizer, write_record
from hiplora.adapters.read import read_update, update_from_model
from hiplora.adapters.update import CARRIED, AdapterUpdate
from hiplora.errors import AdapterError, ConfigError
from hiplora.files import Inputs, check_output_dir, staged_dir
from hiplora.tuner import HipLoraConfig
from hiplora.tuner.experts import stacks

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def save_as_lora(
    model_or_dir: nn.Module | str | os.PathLike | AdapterUpdate,
    path: str | os.PathLike,
    *,
    adapter: str = "default",
    scale: float = 1.0,
    pad_rank: int | None = None,
    prefix: str = "",
    base: str | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
    check_logits: bool = True,
    device: str = "auto",
    details: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write an adapter as a plain LoRA folder that stock PEFT loads, verified before it appears under `path`.

    Args:
        model_or_dir: a PEFT model, an adapter folder or an update, as of `read_update`.
        path: output folder; `overwrite` replaces one that exists.
        adapter: name of the adapter in a model.
        scale: write the update times this number.
        pad_rank: write every module at this rank, filled up with zeros, for servers that want one fixed rank.
        prefix: replaces the leading "model" of the modules' names, for servers of multimodal checkpoints
            ("model.language_model"); the result loads over no causal language model, and logits are not compared.
        base: base model, path or name, instead of the one in the configuration.
        dtype: "float32", "bfloat16" or "float16"; the last two round, and the record says how much.
        check_logits: also compare logits, if the base model of a folder or update is available and fits into memory.
        device: to compare them on, in fp32; "auto" is a GPU where there is one.
        details: more fields of `export.json`, for JSON.

    Returns:
        the record in `export.json`, without the provenance.

    Raises:
        AdapterError: the adapter cannot be read, left its complement, or the result differs by more than rounding;
            nothing is written then.
        ConfigError: `path` exists, `dtype` is unknown, or a module has a higher rank than `pad_rank`.
    """
    check_dtype(dtype)
    update = open_update(model_or_dir, path, overwrite, adapter, base).scaled(scale)
    update.check_low_rank()
    model = model_or_dir if isinstance(model_or_dir, nn.Module) else None
    update = update.renamed(prefix) if prefix else update
    targets = stock_targets(update, None if prefix else skeleton_of(update, model))
    with staged_dir(path, overwrite) as staged:
        write_lora(update, staged, pad_rank, DTYPES[dtype], targets)
        save_tokenizer(update, staged)
        compare = check_logits and model is None and not prefix
        return _verified("lora", update, staged, path, dtype, compare, device, details)


def check_dtype(dtype: str) -> None:
    """Raise ConfigError if a number format cannot be written."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")


def open_update(
    source: Any,
    path: str | os.PathLike,
    overwrite: bool,
    adapter: str = "default",
    base: str | None = None,
    inputs: Inputs | None = None,
) -> Any:
    """Return the update to export to `path`; an error if it leaks, or `path` may not be made or replaced.

    What is replaced must hold neither the adapter, nor its base model, nor one of the `inputs`.
    """
    update = source
    if isinstance(source, nn.Module):
        update = update_from_model(source, adapter)
    elif not isinstance(source, AdapterUpdate):
        update = read_update(source, base)
    update = replace(update, base=base) if base else update
    check_output_dir(path, overwrite, {**(inputs or {}), "the adapter": update.source, "its base model": update.base})
    update.check_leak()
    return update


def _verified(
    to: str,
    update: AdapterUpdate,
    folder: Path,
    path: str | os.PathLike,
    dtype: str,
    check_logits: bool,
    device: str,
    details: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Compare an adapter as written into `folder` with its update; write and return the record, unless fp32 differs."""
    written, exact = read_update(folder), dtype == "float32"
    differences = compare_modules(update, written)
    if exact:
        refuse_over(differences)
    logits: Any = (None, "logits not compared: switched off, of a live model, or with other names")
    if check_logits:
        logits = compare_logits(update, folder, exact, device)
    return write_record(to, update, folder, path, differences, logits, dtype, written.ranks, details)


def save_as_hiplora(
    update: AdapterUpdate,
    path: str | os.PathLike,
    *,
    overwrite: bool = False,
    device: str = "auto",
    details: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write an update as a HiP-LoRA adapter, verify it, and return its record; arguments as of `save_as_lora`.

    Raises:
        AdapterError: a module has no channels of one basis, as all have in a merge of adapters that share it, left its
            complement, or protects other sides than the rest; or the result differs. Nothing is written then.
        ConfigError: `path` exists.
    """
    update = open_update(update, path, overwrite)
    config, tensors = _hiplora_config(update), dict(update.extras)
    for module, channels in update.channels.items():
        for part in ("A", "B", "U", "sigma", "V", *(["delta"] if config.principal_channel else [])):
            tensor = getattr(channels, part)
            name = f"{module}.hiplora_{part}" + (".weight" if part in ("A", "B", "delta") else "")
            tensors[name] = torch.zeros_like(channels.sigma) if tensor is None else tensor  # no gains: gains of zero
    with staged_dir(path, overwrite) as staged:
        _save_tensors(tensors, staged)
        config.save_pretrained(str(staged))
        return _verified("hiplora", update, staged, path, "float32", True, device, details)


def _hiplora_config(update: AdapterUpdate) -> HipLoraConfig:
    """Return the configuration of an update whose modules all have channels of one kind; AdapterError if not."""
    channels = update.channels
    sides = next((one.sides for one in channels.values()), "")
    for module in update.factors:
        if module not in channels:
            problem = "has no two channels in one basis there"
        elif (own_sides := channels[module].sides) != sides:
            problem = f"protects the sides {own_sides!r} there, but {sides!r} elsewhere"
        else:
            problem = ""
        if problem:
            raise AdapterError(
                f"layer {module}: {update.source} {problem}, so it is no HiP-LoRA adapter; save it as plain LoRA, "
                "which is as exact"
            )
    r, rank_pattern = _pattern({module: c.A.shape[0] for module, c in channels.items()})
    alpha, alpha_pattern = _pattern({module: c.scaling * c.A.shape[0] for module, c in channels.items()})
    k, principal_rank_pattern = _pattern({module: len(c.sigma) for module, c in channels.items()})
    projected = all(c.leak_limit is not None for c in channels.values())
    return HipLoraConfig(
        target_modules=sorted(stacks(update.factors)),
        r=r,
        lora_alpha=alpha,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        principal_rank=k,
        principal_rank_pattern=principal_rank_pattern,
        residual_projection=projected,
        principal_channel=not projected or any(c.delta is not None for c in channels.values()),
        basis=update.config.get("basis", "weight"),
        basis_sides=sides,
        fingerprints=dict(update.fingerprints),
        base_precision=update.config.get("base_precision") or "",
        calibration=dict(update.config.get("calibration") or {}),
        **shared_fields(update),
    )


def write_lora(
    update: AdapterUpdate,
    folder: Path,
    pad_rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    targets: Mapping[str, Any] | None = None,
) -> None:
    """Write an update's tensors and stock configuration into an existing folder; nothing is verified.

    `targets` are those of `stock_targets`; None makes them without a model to try them on. AdapterError if a value
    overflows `dtype`; ConfigError if a rank exceeds `pad_rank`.
    """
    targets = targets or stock_targets(update, None)
    tensors, ranks, parameters = {}, {}, targets["target_parameters"] or ()
    for name, (prefix, modules) in stacks(update.factors).items():
        if modules != [name] and modules != (all_of := [f"{name}.{index}" for index in range(len(modules))]):
            raise AdapterError(
                f"layer {min({*all_of} - {*modules})}: is not adapted, but other experts of {name} are, and LoRA has "
                "all or none; export with --to dense"
            )
        pairs = [update.factors[module] for module in modules]
        largest = max(len(A) for A, _ in pairs)
        key = f"{name}.weight"  # PEFT's patterns match the name of a parameter
        ranks[key if key in parameters else name] = rank = pad_rank or largest
        if largest > rank:
            raise ConfigError(
                f"layer {name}: has rank {largest}, which does not fit into --pad-rank {pad_rank}; pass at least "
                f"{largest}"
            )
        A = torch.cat([nn.functional.pad(A, (0, 0, 0, rank - len(A))) for A, _ in pairs])
        B = torch.stack([nn.functional.pad(B, (0, rank - B.shape[1])) for _, B in pairs], dim=2).flatten(1)
        for part, tensor in (("lora_A", A), ("lora_B", B)):
            tensors[f"{prefix}.{part}.weight"] = tensor.to(dtype)
            check_finite(tensor.to(dtype), f"layer {name}: {part} in {str(dtype).removeprefix('torch.')}")
    _save_tensors(tensors | dict(update.extras), folder)
    r, pattern = _pattern(ranks)
    scaling_one = {"r": r, "rank_pattern": pattern, "lora_alpha": r, "alpha_pattern": dict(pattern)}
    LoraConfig(**scaling_one, **targets, **shared_fields(update)).save_pretrained(str(folder))


def _save_tensors(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write an adapter's tensors under PEFT's names."""
    contiguous = {PREFIX + name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})


def _pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the modules' most frequent value, and PEFT's pattern for the modules that have another one."""
    default = Counter(values.values()).most_common(1)[0][0]
    # PEFT takes the first pattern that matches a name's end, so longer names come first.
    longest_first = sorted(values.items(), key=lambda item: -len(item[0]))
    return default, {module: value for module, value in longest_first if value != default}


def shared_fields(update: AdapterUpdate) -> dict[str, Any]:
    """Return the fields of an update's configuration, beside ranks and modules, that every format has."""
    carried = {key: update.config.get(key) for key in CARRIED}
    return {"inference_mode": True, "base_model_name_or_path": update.base or None, **carried}
