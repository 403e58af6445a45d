"""An adapter's folder, as PEFT saves it: its configuration and tensors, checked before they are used."""

import dataclasses
import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING
from pydantic import BaseModel, FiniteFloat, PositiveInt, ValidationError
from safetensors.torch import load_file
from torch import Tensor

from hiplora.adapters.formats import FORMATS
from hiplora.errors import AdapterError, ConfigError, first_line
from hiplora.tuner import check_patterns, plain_name  # its import registers HiP-LoRA with PEFT

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


class _Settings(BaseModel, strict=True):
    """The settings that are read here or by PEFT, as JSON has them."""

    peft_type: str
    r: PositiveInt = 1
    init_r: int | None = None
    lora_alpha: FiniteFloat = 1.0
    lora_dropout: FiniteFloat | None = None
    rank_pattern: dict[str, PositiveInt | list[bool]] | None = None  # AdaLoRA: which ranks were not pruned
    alpha_pattern: dict[str, FiniteFloat] | None = None
    principal_rank_pattern: dict[str, Any] | None = None
    principal_ranks: dict[str, int] | None = None
    fingerprints: dict[str, str] | None = None
    use_rslora: bool | None = None
    fan_in_fan_out: bool | None = None
    principal_channel: bool | None = None
    save_factors: bool | None = None
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    feedforward_modules: list[str] | str | None = None
    layers_pattern: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    modules_to_save: list[str] | None = None
    base_model_name_or_path: str | None = None
    base_precision: str | None = None
    task_type: str | None = None
    bias: str | None = None


def check_finite(tensor: Tensor, what: str) -> None:
    """Raise AdapterError if a tensor is complex or has NaN or Inf, naming `what` and their count."""
    if tensor.is_complex():
        raise AdapterError(f"{what}: is complex; expected real numbers, so the file is damaged or no adapter's")
    finite = torch.isfinite(tensor.float())
    if not bool(finite.all()):
        raise AdapterError(
            f"{what}: {int((~finite).sum())} of {tensor.numel()} values are NaN or Inf; the training diverged or the "
            "file is damaged: use an earlier checkpoint"
        )


def read_folder(folder: Path, modules: Iterable[str] = ()) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return an adapter folder's configuration and its tensors, as saved, by plain name; nothing in it is trusted.

    `modules` are names of a model's modules, with which patterns must match in time too. Errors as of `read_update`.
    """
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder}: no {CONFIG} here; name the folder that `save_pretrained` wrote")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{folder / CONFIG}: not valid JSON ({error}); save the adapter again") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise AdapterError(f"{folder / CONFIG}: no peft_type in it; this is not a PEFT adapter")
    file = next((folder / name for name in (WEIGHTS, "adapter_model.bin") if (folder / name).is_file()), None)
    if file is None:
        raise AdapterError(f"{folder}: has {CONFIG} but no {WEIGHTS}; the adapter was not saved completely")
    try:
        is_pickle = file.suffix == ".bin"
        state_dict = torch.load(file, map_location="cpu", weights_only=True) if is_pickle else load_file(file)
    except Exception as error:  # both libraries raise many types for a damaged file, none of them documented
        raise AdapterError(f"{file}: damaged or cut off ({first_line(error)}); save or copy it again") from error
    tensors: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        check_finite(value, f"{file}: tensor {name.removeprefix(PREFIX)}")
        plain = plain_name(name).replace(".modules_to_save.default.", ".")
        if not torch.equal(tensors.setdefault(plain, value), value):
            raise AdapterError(
                f"{file}: tensor {plain} is in it more than once, the last time as {name}, so it holds several "
                "adapters; save one alone, with save_pretrained(folder, selected_adapters=[…])"
            )
    _check_config(config, [*tensors, *modules], str(folder / CONFIG))
    return config, tensors


def _check_config(config: Mapping[str, Any], tensors: Iterable[str], source: str) -> None:
    """Check the types of the settings that are read, and that no pattern takes long to match; name what is unknown."""
    # Of other methods a rank and its like may be anything: OFT's r is 0 where its blocks have a size.
    unchecked = (
        () if config["peft_type"] in [*FORMATS] else ("r", "init_r", "lora_alpha", "rank_pattern", "alpha_pattern")
    )
    try:
        _Settings.model_validate({name: value for name, value in config.items() if name not in unchecked})
    except ValidationError as error:
        first = error.errors()[0]
        expected = first["msg"].replace("Input should be", "expected")
        raise AdapterError(f"{source}: {first['loc'][0]} is {first['input']!r}; {expected}") from None
    peft_config = PEFT_TYPE_TO_CONFIG_MAPPING.get(config["peft_type"])
    if peft_config is not None:
        known = {field.name for field in dataclasses.fields(peft_config)} | {"peft_version"}
        if unknown := sorted(name for name in config.keys() - known if config[name]):
            warnings.warn(
                f"{source}: {', '.join(unknown)} is not known to PEFT {peft.__version__} and ignored; if it changes "
                "what the adapter does, update PEFT",
                stacklevel=2,
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                peft_config(**{name: config[name] for name in config.keys() & known - {"peft_type", "peft_version"}})
            except Exception as error:  # whatever its own checks raise
                raise AdapterError(f"{source}: PEFT does not accept it ({first_line(error)})") from error
    modules = [name.rpartition(".lora_")[0] or name for name in tensors]
    check_patterns(config, modules, f"{source}: ", AdapterError)
