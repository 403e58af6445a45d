"""Read any adapter as the update that it makes: low-rank ones as saved, PEFT's other methods by PEFT's own merge."""

import contextlib
import copy
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from tqdm.auto import tqdm

from hiplora.adapters.base import BaseWeights, is_product, quiet_loading, weight_of
from hiplora.adapters.folder import PREFIX, check_finite, read_folder
from hiplora.adapters.formats import Saved, is_low_rank, update_of
from hiplora.adapters.update import AdapterUpdate, Pair, zero_pair
from hiplora.errors import AdapterError, first_line
from hiplora.models import hub_name

# Attributes in which a live layer holds tensors that an adapter does not save → the tensor's name.
_UNSAVED = {f"hiplora_{part}": f"hiplora_{part}" for part in ("U", "sigma", "V", "shrink_U", "shrink_V")}
_UNSAVED |= {f"_osf_{part}_low_init": f"osf_svd_params.{part}_low_init" for part in "USV"}
_RANK_TOLERANCE = 1e-6  # of the largest singular value of a difference of weights


def read_update(adapter_dir: str | os.PathLike | AdapterUpdate, base: str | None = None) -> AdapterUpdate:
    """Read an adapter folder as the update it makes to its base model; an `AdapterUpdate` is returned as it is.

    HiP-LoRA, LoRA, AdaLoRA or OSF (PiSSA and the like as the difference that PEFT saves). `base`, path or name, stands
    for the base model in the configuration; it is only read for OSF, for HiP-LoRA saved without factors, and for DoRA
    and PEFT's other methods, which are merged into it layer by layer.

    Raises:
        ConfigError: there is no adapter in the folder.
        AdapterError: the folder is damaged, it changes more than the weights of linear layers, or a weight of the base
            model is not the one that the adapter was made for; the message names the file and tensor, and the way out.
    """
    if isinstance(adapter_dir, AdapterUpdate):
        adapter_dir.check_low_rank()
        return adapter_dir
    config, tensors = read_folder(Path(adapter_dir))
    name = base or config.get("base_model_name_or_path") or ""
    if is_low_rank(config):
        return update_of(Saved(config, tensors, str(adapter_dir), name))
    model = BaseWeights(name, config.get("task_type")).load("cpu", torch.float32)
    with attached(model, adapter_dir) as adapted:
        return _difference(adapted, "default", config, str(adapter_dir), name)


def update_from_model(model: nn.Module, adapter: str = "default") -> AdapterUpdate:
    """Read a live PEFT model's adapter as the update it makes; the model is left as it is.

    AdapterError if there is no such adapter, it changes more than linear layers, or it has NaN or Inf.
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
    base = config["base_model_name_or_path"] or ""
    if not is_low_rank(config):
        return _difference(model, adapter, config, source, base)
    pattern = getattr(live, "rank_pattern", None)
    try:
        state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    finally:
        if pattern is not None:
            live.rank_pattern = pattern  # PEFT renames its keys when it returns an AdaLoRA adapter's tensors
    for name, layer in model.named_modules():
        for attribute, saved in _UNSAVED.items():
            if adapter in (tensors_of := getattr(layer, attribute, {})):
                state[f"{name}.{saved}"] = tensors_of[adapter]
    tensors = {name.removeprefix(PREFIX): value.detach().cpu() for name, value in state.items()}
    return update_of(Saved(config, tensors, source, base))


@contextlib.contextmanager
def attached(model: nn.Module, folder: str | os.PathLike) -> Iterator[PeftModel]:
    """Put an adapter on a bare model inside the block and yield the PEFT model.

    AdapterError if the folder is damaged (`read_folder`), does not change weights, or is not for this model.
    """
    config, _ = read_folder(Path(folder), dict(model.named_modules()))
    kind, base, name = config["peft_type"], config.get("base_model_name_or_path"), getattr(model, "name_or_path", "")
    if not issubclass(PEFT_TYPE_TO_TUNER_MAPPING.get(kind, BaseTuner), BaseTuner):
        raise AdapterError(
            f"{folder}: {kind} changes what the model reads, not its weights: it is no update, and cannot be measured"
        )
    if base and name and Path(hub_name(base)).resolve().name != Path(hub_name(name)).resolve().name:
        caveat = "unless these are the same weights, the results say nothing about the adapter"
        warnings.warn(f"{folder}: was made for {base}, and is put on {name}; {caveat}", stacklevel=4)
    incompatible_keys: list[Any] = []
    handle = model.register_load_state_dict_post_hook(lambda _, keys: incompatible_keys.append(keys))
    try:
        with quiet_loading():
            warnings.filterwarnings("ignore", message="Unexpected keyword arguments")  # `read_folder` warns of them
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, str(folder)).eval()
    except AdapterError:
        raise
    except Exception as error:  # PEFT has no types of its own for what does not fit
        raise AdapterError(
            f"{folder}: cannot be put on the model ({first_line(error)}); check that it is for this base"
        ) from error
    finally:
        handle.remove()
    try:
        if unexpected := [name for keys in incompatible_keys for name in keys.unexpected_keys]:
            raise AdapterError(f"{folder}: the model has no place for {unexpected[0]}; check that it is for this base")
        yield adapted
    finally:
        # `unload` would leave the adapter's copies of whole modules behind.
        for module in list(adapted.modules()):
            if isinstance(module, ModulesToSaveWrapper):
                module.modules_to_save.update(dict.fromkeys(module.modules_to_save, module.original_module))
        adapted.unload()


@torch.no_grad()
def _difference(model: nn.Module, adapter: str, config: Mapping[str, Any], source: str, base: str) -> AdapterUpdate:
    """Return what PEFT's merge of an adapter adds to each linear layer of a model, of as much rank as it has.

    Each layer is copied and merged in float64. AdapterError if PEFT cannot merge it, or changes other layers or biases.
    """
    factors: dict[str, Pair] = {}
    extras: dict[str, Tensor] = {}
    kind = "DoRA" if config.get("use_dora") else config["peft_type"]
    for name, layer in tqdm([*model.named_modules()], "reading layers", disable=None, delay=2, leave=False):
        plain = name.removeprefix(PREFIX)
        if isinstance(layer, ModulesToSaveWrapper) and adapter in layer.modules_to_save:
            parameters = layer.modules_to_save[adapter].named_parameters()
            extras |= {f"{plain}.{part}": value.detach().cpu() for part, value in parameters}
        if not isinstance(layer, BaseTunerLayer) or adapter not in layer._get_available_adapters():
            continue
        merged: Any = copy.deepcopy(layer)
        inner = merged.cpu().double().get_base_layer()
        if not is_product(inner) or not inner.weight.is_floating_point():
            problem = "which is no linear layer" if not is_product(inner) else "which is quantised"
            raise AdapterError(f"{source}: {kind} adapts {plain}, {problem}; merge it with PEFT instead")
        try:
            if merged.merged:
                merged.unmerge()
            before, bias = weight_of(inner).clone(), None if inner.bias is None else inner.bias.clone()
            merged.merge(adapter_names=[adapter])
        except Exception as error:  # whatever a method that cannot be merged, or not in float64, raises
            raise AdapterError(f"{source}: PEFT cannot merge {kind} into {plain} ({first_line(error)})") from error
        inner = merged.get_base_layer()
        if bias is not None and not torch.equal(bias, inner.bias):
            raise AdapterError(f"{source}: {kind} changes the bias of {plain} too; merge it with PEFT instead")
        delta = weight_of(inner) - before
        check_finite(delta, f"{source}: the change of {plain}")
        factors[plain] = _thin(delta)
    if not factors:
        raise AdapterError(f"{source}: {kind} adapts no linear layer of the model; nothing was read")
    return AdapterUpdate(base, config["peft_type"].lower(), dict(config), factors, extras=extras, source=source)


def _thin(delta: Tensor) -> Pair:
    """Return factors (A', B') of a matrix in float64, of its numerical rank."""
    if not delta.any():
        return zero_pair(*delta.shape)
    if len(delta) > delta.shape[1]:
        A, B = _thin(delta.T)
        return B.T.contiguous(), A.T.contiguous()
    squares, U = torch.linalg.eigh(delta @ delta.T)
    U = U[:, squares > _RANK_TOLERANCE**2 * squares[-1]]
    return (U.T @ delta).float(), U.float().contiguous()
