"""Export to a standalone model folder: the adapter added to its base weights once and for all."""

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.pytorch_utils import Conv1D

from hiplora.adapters.base import BaseWeights, check_base, is_tied, load_base
from hiplora.adapters.check import added, logits_of, no_room, refuse_logits, relative_difference
from hiplora.adapters.lora import DTYPES, check_dtype, open_update
from hiplora.adapters.output import ExportReport, write_card
from hiplora.adapters.update import AdapterUpdate, Update
from hiplora.errors import AdapterError, ConfigError
from hiplora.files import staged_dir
from hiplora.models import quiet_transformers, resolve

_SUM_LIMIT = 1e-5  # what an fp32 sum may be off from what is known in float64
_NO_WRAP: Callable[[Iterable[str]], Iterable[str]] = iter


@torch.no_grad()
def save_dense(
    model_or_dir: nn.Module | str | os.PathLike | Update,
    path: str | os.PathLike,
    base: str | None = None,
    dtype: str | None = None,
    *,
    adapter: str = "default",
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    tolerance: float = 1e-3,
    check_logits: bool = True,
    details: Mapping[str, Any] | None = None,
    wrap: Callable[[Iterable[str]], Iterable[str]] = _NO_WRAP,
) -> ExportReport:
    """Write the base model with the adapter merged into it, as a folder that `from_pretrained` loads.

    The base model is loaded from disk in its own precision and checked against the adapter's fingerprints. Each sum is
    made in fp32 and rounded once. Embeddings that were tied are untied where the adapter changes one side only. The
    tokenizer and the generation settings come along.

    Args:
        model_or_dir: a PEFT model, an adapter folder or an update, of low rank or not.
        path: output folder.
        base: base model, path or name, instead of the one in the configuration.
        dtype: "float32", "bfloat16" or "float16"; None keeps the base model's own.
        adapter: name of the adapter in a model.
        overwrite: replace `path` if it exists.
        max_shard_size: largest size of one file of weights, in bytes or as "5GB".
        tolerance: largest accepted difference of a logit, in units of the largest one, for fp32 models; half
            precision rounds the merged weights, and the report says how much that changes.
        check_logits: also load what was written and compare logits, for updates of low rank.
        details: more fields of `export.json`, for JSON.
        wrap: called with the module names, yields them; for a progress bar.

    Raises:
        AdapterError: the adapter cannot be read or does not fit the base model, or the merged model differs; nothing
            is written then.
        ConfigError: `path` exists, or `dtype` or `max_shard_size` is unusable.
    """
    if dtype is not None:
        check_dtype(dtype)
    _check_size(max_shard_size)
    update = open_update(model_or_dir, path, overwrite, adapter, base)
    model: Any = _load_whole(update.base)
    check_base(model, update, update.base)
    exact, untied = model.dtype == torch.float32, untie(model, update)
    replace_extras(model, update)
    expected: Tensor | None = None
    note = "logits not compared: switched off"
    if check_logits and isinstance(update, AdapterUpdate):
        with added(model, update.factors):
            expected = logits_of(model)
    elif check_logits:
        note = "logits not compared: the merged updates are not of low rank"
    differences = merge_into(model, update, DTYPES[dtype] if dtype else None, wrap)
    with staged_dir(path, overwrite) as staged:
        _save(model, update.base, staged, max_shard_size)
        written, logits = str(model.dtype).removeprefix("torch."), None
        del model
        if expected is not None:
            logits, note = relative_difference(logits_of(load_base(str(staged), "auto")), expected), ""
            if exact and written == "float32":
                refuse_logits(update.source, logits, tolerance)
        report = ExportReport(
            "dense",
            str(path),
            update.base,
            written,
            differences,
            tolerance,
            logits,
            note,
            files=tuple(sorted(file.name for file in staged.glob("*.safetensors"))),
            untied=untied,
        )
        write_card(update, report, staged, details)
    return report


def merge_into(
    model: nn.Module,
    update: Update,
    dtype: torch.dtype | None = None,
    wrap: Callable[[Iterable[str]], Iterable[str]] = _NO_WRAP,
) -> dict[str, float]:
    """Add an update to a bare model's weights, in fp32, rounded once; other weights are cast to `dtype` too.

    Returns:
        per module ‖W_written − (W + ΔW)‖ in units of ‖W‖ and ‖ΔW‖ together, ΔW from the adapter's own channels.

    Raises:
        AdapterError: a value overflows the number format, or a sum is wrong by more than rounding.
    """
    differences = {}
    for module in wrap(list(update.modules)):
        layer: Any = model.get_submodule(module)
        before, transposed = layer.weight.detach(), isinstance(layer, Conv1D)
        delta = update.delta(module).to(before.device)
        merged = before.float() + (delta.T if transposed else delta)
        written = merged.to(dtype or before.dtype)
        if not torch.isfinite(written).all() and torch.isfinite(merged).all():
            name = str(written.dtype).removeprefix("torch.")
            raise AdapterError(f"layer {module}: the merged weight overflows {name}; pass --dtype float32")
        if isinstance(update, AdapterUpdate):
            P, Q = (factor.to(before.device) for factor in update.exact_factors(module))
            delta = P @ Q
        delta = delta.T if transposed else delta
        exact = before.double() + delta
        scale = float((before.double().square().sum() + delta.double().square().sum()).sqrt()) or 1.0
        off = float((merged.double() - exact).norm()) / scale
        if not off <= _SUM_LIMIT:
            raise AdapterError(
                f"layer {module}: the merged weight differs by {off:.1e} from the base weight plus the update, more "
                f"than {_SUM_LIMIT:.0e}; nothing was written"
            )
        differences[module] = float((written.double() - exact).norm()) / scale
        layer.weight = nn.Parameter(written, requires_grad=False)
    if dtype is not None:
        model.to(dtype)
    return differences


def untie(model: Any, update: Update) -> bool:
    """Give the output head a weight of its own where the adapter changes one of two tied weights."""
    if not is_tied(model):
        return False
    head = model.get_output_embeddings()
    changed = {id(model.get_submodule(module).weight) for module in update.modules}
    changed |= {id(dict(model.named_parameters(remove_duplicate=False)).get(name)) for name in update.extras}
    if id(head.weight) not in changed:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.get_text_config().tie_word_embeddings = False
    model.config.tie_word_embeddings = False
    return True


@torch.no_grad()
def replace_extras(model: nn.Module, update: Update) -> None:
    """Copy the tensors of `modules_to_save` into the model's own parameters.

    Raises:
        AdapterError: the model has no such parameter, or it has another shape.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in update.extras.items():
        if name not in parameters:
            raise AdapterError(f"{update.source}: tensor {name} is for no parameter of the base model")
        if tensor.shape != parameters[name].shape:
            raise AdapterError(
                f"{update.source}: tensor {name} is {tuple(tensor.shape)}, the base model's "
                f"{tuple(parameters[name].shape)}; a vocabulary that was resized for training must be resized in the "
                "base model first"
            )
        parameters[name].copy_(tensor)


def _load_whole(name: str) -> nn.Module:
    """Load the base model in its own precision.

    Raises:
        AdapterError: it cannot be read, is quantised, or does not fit into memory.
    """
    weights = BaseWeights(name)
    configs = weights.config, weights.config.get_text_config()
    if any(getattr(config, "quantization_config", None) for config in configs):
        raise AdapterError(
            f"base model {name}: is quantised, and an update cannot be added to quantised weights without loss; name "
            "the unquantised model as base=… (--base)"
        )
    if why := no_room(weights, (weights.config.dtype or torch.float32).itemsize):
        raise AdapterError(f"{why}; export to plain LoRA instead, or on a machine with more memory")
    return load_base(name, "auto")


def _check_size(size: int | str) -> None:
    try:
        split_torch_state_dict_into_shards({"probe": torch.zeros(1)}, max_shard_size=size)
    except ValueError as error:
        raise ConfigError(
            f"max_shard_size is {size!r}; expected a size, as 5GB or 500MB (--max-shard-size)"
        ) from error


def _save(model: Any, base: str, folder: Path, max_shard_size: int | str) -> None:
    with quiet_transformers(always=False):
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    with suppress(OSError, ValueError):  # a base model without a tokenizer gives a merged model without one
        AutoTokenizer.from_pretrained(resolve(base)).save_pretrained(folder)
