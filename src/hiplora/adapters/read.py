"""Read any adapter that is a sum of low-rank updates: HiP-LoRA, LoRA, AdaLoRA, OSF, and what PEFT converts to LoRA."""

import dataclasses
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, get_peft_model_state_dict
from pydantic import BaseModel, FiniteFloat, PositiveInt, ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn

from hiplora.adapters.formats import FORMATS, Saved, update_of
from hiplora.adapters.update import AdapterUpdate
from hiplora.errors import AdapterError, ConfigError, first_line
from hiplora.tuner import check_patterns, plain_name  # its import registers HiP-LoRA with PEFT

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# What a live layer holds for an adapter beside what it saves → the tensor's name.
_HELD = {f"hiplora_{part}": f"hiplora_{part}" for part in ("U", "sigma", "V", "shrink_U", "shrink_V")}
_HELD |= {f"_osf_{part}_low_init": f"osf_svd_params.{part}_low_init" for part in "USV"}


class _Settings(BaseModel, strict=True):
    """The settings that are read here or by PEFT, as JSON has them."""

    peft_type: str
    r: PositiveInt = 1
    init_r: int | None = None
    lora_alpha: FiniteFloat = 1.0
    lora_dropout: FiniteFloat | None = None
    rank_pattern: dict[str, PositiveInt | list[bool]] | None = None  # AdaLoRA: which ranks are left
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


def read_update(adapter_dir: str | os.PathLike | AdapterUpdate, base: str | None = None) -> AdapterUpdate:
    """Read an adapter folder as the update it makes to its base model; an `AdapterUpdate` is returned as it is.

    HiP-LoRA, LoRA, AdaLoRA or OSF (PiSSA and the like as the difference that PEFT saves). `base`, path or name, stands
    for the base model in the configuration; it is only read for OSF, and for HiP-LoRA saved without factors.

    Raises:
        ConfigError: there is no adapter in the folder.
        AdapterError: the folder is damaged, its method is not a plain update, or a weight of the base model is
            not the one that the adapter was made for; the message names the file and tensor, and the way out.
    """
    if isinstance(adapter_dir, AdapterUpdate):
        adapter_dir.check_low_rank()
        return adapter_dir
    config, tensors = read_folder(Path(adapter_dir))
    return update_of(Saved(config, tensors, str(adapter_dir), base or config.get("base_model_name_or_path") or ""))


def update_from_model(model: nn.Module, adapter: str = "default") -> AdapterUpdate:
    """Read a live PEFT model's adapter as the update it makes; the model is left as it is.

    AdapterError if there is no such adapter, it is not a plain update, or it has NaN or Inf.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    configs: Mapping[str, Any] = getattr(model, "peft_config", {})
    if adapter not in configs:
        known = ", ".join(map(repr, configs)) or "none"
        raise AdapterError(f"the model has no adapter named {adapter!r} (it has: {known}); pass adapter=…")
    source = f"adapter {adapter!r}"
    for name, value in model.named_parameters():
        if adapter in name.split("."):
            check_finite(value.detach(), f"{source}: tensor {name}")
    live = configs[adapter]
    config = json.loads(json.dumps(live.to_dict(), default=sorted))  # sets are lists in a file
    pattern = getattr(live, "rank_pattern", None)
    try:
        state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    finally:
        if pattern is not None:
            live.rank_pattern = pattern  # PEFT renames its keys when it returns an AdaLoRA adapter's tensors
    for name, layer in model.named_modules():
        for attribute, saved in _HELD.items():
            if adapter in (held := getattr(layer, attribute, {})):
                state[f"{name}.{saved}"] = held[adapter]
    tensors = {name.removeprefix(PREFIX): value.detach().cpu() for name, value in state.items()}
    return update_of(Saved(config, tensors, source, config["base_model_name_or_path"] or ""))


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
    """Return an adapter folder's configuration and its tensors, as saved, by plain name; checked as a stranger's.

    `modules` are names of a model's modules, with which patterns must match in time too. Errors as of `read_update`.
    """
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder}: no {CONFIG} here; name the folder that `save_pretrained` wrote")
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{folder / CONFIG}: not valid JSON ({error}); save the adapter again") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise AdapterError(f"{folder / CONFIG}: no peft_type in it; this is not a PEFT adapter")
    file = next((folder / name for name in (WEIGHTS, "adapter_model.bin") if (folder / name).is_file()), None)
    if file is None:
        raise AdapterError(f"{folder}: has {CONFIG} but no {WEIGHTS}; the adapter was not saved completely")
    try:
        pickle = file.suffix == ".bin"
        found = torch.load(file, map_location="cpu", weights_only=True) if pickle else load_file(file)
    except Exception as error:  # both libraries raise many types for a damaged file, none of them documented
        raise AdapterError(f"{file}: damaged or cut off ({first_line(error)}); save or copy it again") from error
    tensors: dict[str, Tensor] = {}
    for name, value in found.items():
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
    own = config["peft_type"] in FORMATS  # elsewhere a rank may be anything: OFT's is 0 where its blocks have a size
    try:
        _Settings.model_validate(config if own else {**config, "r": 1})
    except ValidationError as error:
        first = error.errors()[0]
        why = first["msg"].replace("Input should be", "expected")
        raise AdapterError(f"{source}: {first['loc'][0]} is {first['input']!r}; {why}") from None
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
