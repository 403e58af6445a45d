"""Adapter folders on disk: configuration and tensors, or an error that names what is damaged."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hiplora.errors import AdapterError, ConfigError
from hiplora.files import check_output_dir

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
PREFIX = "base_model.model."


def read_folder(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return an adapter folder's configuration and its tensors, as saved, by name without PEFT's prefix.

    Raises:
        AdapterError: not an adapter folder, an unreadable or cut-off file, or a tensor with NaN or Inf.
    """
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        raise AdapterError(f"{folder}: no {CONFIG} here; name the folder that `save_pretrained` wrote")
    config = _read_config(folder / CONFIG)
    file = folder / WEIGHTS if (folder / WEIGHTS).is_file() else folder / PICKLED
    if not file.is_file():
        raise AdapterError(f"{folder}: has {CONFIG} but no {WEIGHTS}; the adapter was not saved completely")
    tensors = {name.removeprefix(PREFIX): value for name, value in _read_tensors(file).items()}
    for name, value in tensors.items():
        check_finite(value, f"{file}: tensor {name}")
    return config, tensors


def check_out(
    path: str | os.PathLike, overwrite: bool, source: str, what: str = "the adapter that is exported"
) -> None:
    """Refuse an output folder that exists, or whose replacement would delete `source`, called `what` in the message.

    Raises:
        ConfigError: naming the folder and the remedy.
    """
    final = check_output_dir(path, overwrite).resolve()
    if os.path.isdir(source) and (Path(source).resolve() == final or final in Path(source).resolve().parents):
        raise ConfigError(f"--out {path}: replacing it would delete {what}; name another folder")


def check_finite(tensor: Tensor, what: str) -> None:
    """Refuse NaN and Inf.

    Raises:
        AdapterError: naming `what` and the count of bad values.
    """
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise AdapterError(
            f"{what}: {bad} of {tensor.numel()} values are NaN or Inf; the training diverged or the file is "
            "damaged: use an earlier checkpoint"
        )


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise AdapterError(f"{file}: not valid JSON ({error}); save the adapter again") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise AdapterError(f"{file}: no peft_type in it; this is not a PEFT adapter")
    return config


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".bin":
            return torch.load(file, map_location="cpu", weights_only=True)
        from safetensors.torch import load_file

        return load_file(file)
    except Exception as error:  # both libraries raise many types for a damaged file, none of them documented
        raise AdapterError(f"{file}: damaged or cut off ({error}); save or copy the adapter again") from error
