"""Export to a standalone model folder: the adapter added to its base weights once and for all."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer
from transformers.pytorch_utils import Conv1D

from hiplora.adapters.base import BaseWeights, check_base, is_tied, load_base
from hiplora.adapters.check import added, logit_difference, logits_of
from hiplora.adapters.lora import DTYPES, check_dtype, open_update
from hiplora.adapters.output import ExportReport, write_card
from hiplora.adapters.update import AdapterUpdate
from hiplora.errors import AdapterError
from hiplora.files import staged_dir
from hiplora.models import quiet_transformers, resolve

_SUM_LIMIT = 1e-5  # what an fp32 sum may be off from what is known in float64


@torch.no_grad()
def save_dense(
    model_or_dir: nn.Module | str | os.PathLike | AdapterUpdate,
    path: str | os.PathLike,
    base: str | None = None,
    dtype: str | None = None,
    *,
    adapter: str = "default",
    overwrite: bool = False,
    tolerance: float = 1e-3,
    check_logits: bool = True,
    details: Mapping[str, Any] | None = None,
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
        tolerance: largest accepted difference of a logit, in units of the largest one, for fp32 models; half
            precision rounds the merged weights, and the report says how much that changes.
        check_logits: also load what was written and compare logits, for updates of low rank.
        details: more fields of `export.json`, for JSON.

    Raises:
        AdapterError: the adapter cannot be read or does not fit the base model, or the merged model differs; nothing
            is written then.
        ConfigError: `path` exists, or `dtype` is unknown.
    """
    check_dtype(dtype)
    update = open_update(model_or_dir, path, overwrite, adapter, base)
    model: Any = BaseWeights(update.base).whole
    check_base(model, update, update.base)
    exact, untied = model.dtype == torch.float32, untie(model, update)
    replace_extras(model, update)
    expected, note = None, "logits not compared: switched off or not of low rank"
    if check_logits and update.factors:
        with added(model, update.factors):
            expected, note = logits_of(model), ""
    differences = merge_into(model, update, DTYPES[dtype] if dtype else None)
    written, logits = str(model.dtype).removeprefix("torch."), None
    with staged_dir(path, overwrite) as staged:
        _save(model, update.base, staged)
        del model
        if expected is not None:
            limit = tolerance if exact and written == "float32" else None
            found = logits_of(load_base(str(staged), "auto"))
            logits = logit_difference(found, expected, update.source, limit)
        report = ExportReport("dense", str(path), update.base, written, differences, logits, note, untied=untied)
        write_card(update, report, staged, details)
    return report


def merge_into(model: nn.Module, update: AdapterUpdate, dtype: torch.dtype | None) -> dict[str, float]:
    """Add an update to a bare model's weights, in fp32, rounded once; other weights are cast to `dtype` too.

    Returns:
        per module ‖W_written − (W + ΔW)‖ in units of ‖W‖ and ‖ΔW‖ together, ΔW from the adapter's own channels.

    Raises:
        AdapterError: a value overflows the number format, or a sum is wrong by more than rounding.
    """
    differences = {}
    for module in tqdm(update.modules, "merging modules", disable=None, delay=2):
        layer: Any = model.get_submodule(module)
        weight = layer.weight.detach()
        before = weight.T if isinstance(layer, Conv1D) else weight
        delta = update.delta(module).to(before.device)
        merged = before.float() + delta
        written = merged.to(dtype or before.dtype)
        if not torch.isfinite(written).all() and torch.isfinite(merged).all():
            number = str(written.dtype).removeprefix("torch.")
            raise AdapterError(f"layer {module}: the merged weight overflows {number}; pass --dtype float32")
        if module in update.factors:
            P, Q = (factor.to(before.device) for factor in update.exact_factors(module))
            delta = P @ Q
        exact = before.double() + delta
        scale = (before.norm() ** 2 + delta.norm() ** 2).sqrt().clamp_min(1e-30)
        off = float((merged.double() - exact).norm() / scale)
        if not off <= _SUM_LIMIT:
            raise AdapterError(
                f"layer {module}: the merged weight differs by {off:.1e} from the base weight plus the update, more "
                f"than {_SUM_LIMIT:.0e}; nothing was written"
            )
        differences[module] = float((written.double() - exact).norm() / scale)
        final = written.T.contiguous() if isinstance(layer, Conv1D) else written
        layer.weight = nn.Parameter(final, requires_grad=False)
    if dtype is not None:
        model.to(dtype)
    return differences


def untie(model: Any, update: AdapterUpdate) -> bool:
    """Give the output head a weight of its own where the adapter changes one of two tied weights."""
    if not is_tied(model):
        return False
    head, parameters = model.get_output_embeddings(), dict(model.named_parameters(remove_duplicate=False))
    changed = [*(f"{module}.weight" for module in update.modules), *update.extras]
    if not any(parameters.get(name) is head.weight for name in changed):
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
    return True


@torch.no_grad()
def replace_extras(model: nn.Module, update: AdapterUpdate) -> None:
    """Copy the tensors of `modules_to_save` into the model; AdapterError if one does not fit."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in update.extras.items():
        shape = tuple(parameters[name].shape) if name in parameters else "no such parameter"
        if tuple(tensor.shape) != shape:
            raise AdapterError(
                f"{update.source}: tensor {name} is {tuple(tensor.shape)}, the base model's {shape}; a vocabulary "
                "that was resized for training must be resized in the base model first"
            )
        parameters[name].copy_(tensor)


def _save(model: Any, base: str, folder: Path) -> None:
    with quiet_transformers(always=False):
        model.save_pretrained(folder)
    with suppress(OSError, ValueError):  # a base model without a tokenizer gives a merged model without one
        AutoTokenizer.from_pretrained(resolve(base), trust_remote_code=False).save_pretrained(folder)
