"""Export to a standalone model folder: the adapter added to its base weights once and for all."""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from hiplora.adapters.base import BaseWeights, check_base, replace_extras, weight_of
from hiplora.adapters.check import added, logit_difference, logits_of
from hiplora.adapters.lora import DTYPES, check_dtype, open_update
from hiplora.adapters.output import save_tokenizer, write_record
from hiplora.adapters.update import AdapterUpdate
from hiplora.errors import AdapterError
from hiplora.files import staged_dir
from hiplora.models import quiet_transformers
from hiplora.tuner.experts import fuse, unroll


@torch.no_grad()
def save_dense(
    model_or_dir: nn.Module | str | os.PathLike | AdapterUpdate,
    path: str | os.PathLike,
    *,
    adapter: str = "default",
    scale: float = 1.0,
    base: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    check_logits: bool = True,
    details: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the base model with the adapter merged into it, as a folder that `from_pretrained` loads.

    The base model is loaded from disk and checked against the adapter's fingerprints. Each sum is made in fp32 and
    rounded once. Embeddings that were tied are untied where the adapter changes one side only. The tokenizer and the
    generation settings come along.

    Args:
        model_or_dir: a PEFT model, an adapter folder or an update, of low rank or not.
        path: output folder; arguments not listed here are those of `save_as_lora`.
        dtype: None keeps the base model's own. Half precision rounds the merged weights, and the record says how much.
        check_logits: also load the written model and compare logits, for updates of low rank.

    Returns:
        the record in `export.json`, without the provenance.

    Raises:
        AdapterError: the adapter cannot be read or does not fit the base model, or the merged model differs; nothing
            is written then.
        ConfigError: `path` exists, or `dtype` is unknown.
    """
    if dtype is not None:
        check_dtype(dtype)
    update = open_update(model_or_dir, path, overwrite, adapter, base).scaled(scale)
    weights = BaseWeights.of(update)
    model: Any = weights.whole
    check_base(model, update, update.base)
    exact, untied = model.dtype == torch.float32, replace_extras(model, update)
    expected = None
    if check_logits and update.factors and weights.predicts_tokens:
        with added(model, update):
            expected = logits_of(model)
    differences = merge_into(model, update, DTYPES[dtype] if dtype else None)
    written_dtype, difference = str(model.dtype).removeprefix("torch."), None
    with staged_dir(path, overwrite) as staged:
        with quiet_transformers(always=False):
            model.save_pretrained(staged)
        save_tokenizer(update, staged, base=True)
        del model, weights
        if expected is not None:
            logits = logits_of(BaseWeights.of(replace(update, base=str(staged))).whole)
            difference = logit_difference(logits, expected, update.source, exact and written_dtype == "float32")
        note = "" if expected is not None else "logits not compared: switched off, not of low rank, or none of tokens"
        more = {"untied": untied, **(details or {})}
        return write_record(
            "dense", update, staged, path, differences, (difference, note), written_dtype, details=more
        )


def merge_into(model: nn.Module, update: AdapterUpdate, dtype: torch.dtype | None) -> dict[str, float]:
    """Add an update to a bare model's weights, in fp32, rounded once; other weights are cast to `dtype` too.

    Returns per module ‖W_written − (W + ΔW)‖ in units of ‖W‖ and ‖ΔW‖ together; AdapterError if a value overflows.
    """
    differences = {}
    unroll(model)
    for module in tqdm(update.modules, "merging modules", disable=None, delay=2):
        layer: Any = model.get_submodule(module)
        before = weight_of(layer)
        delta = update.delta(module).to(before.device)
        written = (before.float() + delta).to(dtype or before.dtype)
        if not torch.isfinite(written).all() and torch.isfinite(before).all():
            written_dtype = str(written.dtype).removeprefix("torch.")
            raise AdapterError(f"layer {module}: the merged weight overflows {written_dtype}; pass --dtype float32")
        scale = (before.float().norm() ** 2 + delta.norm() ** 2).sqrt().clamp_min(1e-30)
        differences[module] = float((written.double() - before.double() - delta.double()).norm() / scale)
        final = written.T.contiguous() if isinstance(layer, Conv1D) else written
        layer.weight = nn.Parameter(final, requires_grad=False)
    fuse(model)
    if dtype is not None:
        model.to(dtype)
    return differences
