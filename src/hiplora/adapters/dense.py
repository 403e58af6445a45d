"""Export to a standalone model folder: the adapter added to its base weights once and for all."""

import copy
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from hiplora.adapters.adapter import AdapterUpdate, Update
from hiplora.adapters.base_weights import BaseWeights, load_base
from hiplora.adapters.card import write_model_card
from hiplora.adapters.check import logits_of, no_room, relative_difference
from hiplora.adapters.folder import check_out
from hiplora.adapters.lora import DTYPES
from hiplora.adapters.shards import TensorSpec, Wrap, check_shard_size, write_shards
from hiplora.adapters.streaming import MergedTensors, obstacle
from hiplora.adapters.update import read_update, update_from_model
from hiplora.adapters.whole import adapted_logits, check_base, merge_whole, replace_extras, set_untied, untie
from hiplora.errors import AdapterError, ConfigError
from hiplora.files import staged_dir
from hiplora.models import resolve
from hiplora.models.quiet import quiet_transformers

__all__ = ["DenseReport", "check_base", "save_dense"]

_GENERATION = "generation_config.json"
_OFF = "logits not compared: switched off"


@dataclass(frozen=True)
class DenseReport:
    """What was written, and how far it is from the base model with the adapter.

    `differences` has, per module, ‖W_written − (W + ΔW)‖ in units of ‖W‖ and ‖ΔW‖ together, where rounding to `dtype`
    counts. `logits` is the largest difference of a logit in units of the largest one; None where logits were not
    compared, and `note` says why. `untied` says that the output head was given a weight of its own, `streamed` that
    the model was never in memory as a whole; `files` are its weights.
    """

    path: str
    base: str
    dtype: str
    differences: Mapping[str, float]
    untied: bool
    streamed: bool
    files: tuple[str, ...]
    logits: float | None = None
    note: str = ""

    @property
    def modules(self) -> int:
        """Number of modules that were merged."""
        return len(self.differences)

    @property
    def worst(self) -> tuple[str, float]:
        """The module that differs most, and by how much."""
        return max(self.differences.items(), key=lambda item: item[1])

    @property
    def checks(self) -> list[str]:
        """What was verified, in words."""
        made = ["every merged weight: the base weight plus the update"]
        if self.streamed:
            made.append("every tensor: read back from its file")
        if self.logits is not None:
            made.append("logits: those of the base model with the adapter")
        return made

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready record."""
        module, difference = self.worst
        fields = {key: value for key, value in asdict(self).items() if key != "differences"}
        return {
            "schema": 1,
            "kind": "export",
            "to": "dense",
            **fields,
            "modules": self.modules,
            "largest_difference": {"module": module, "relative": difference},
            "checks": self.checks,
        }


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
    wrap: Wrap = iter,
) -> DenseReport:
    """Write the base model with the adapter merged into it, as a folder that `from_pretrained` loads.

    A base model in safetensors files is read, merged and written tensor by tensor, and read back; another one is
    loaded as a whole, which the report's `note` says. The base weights are checked against the adapter's fingerprints.
    Embeddings that were tied are untied where the adapter changes one side only. The tokenizer and the generation
    settings come along.

    Args:
        model_or_dir: a PEFT model, an adapter folder or an update, of low rank or not.
        path: output folder.
        base: base model, path or name, where the one in the configuration is not to be used.
        dtype: "float32", "bfloat16" or "float16"; None keeps the base model's own.
        adapter: name of the adapter in a model.
        overwrite: replace `path` if it exists.
        max_shard_size: largest size of one file of weights, in bytes or as "5GB".
        tolerance: largest accepted difference of a logit, in units of the largest one, for fp32 models; half
            precision rounds the merged weights, and the report says how much that changes.
        check_logits: also compare logits, for updates of low rank, where the model fits into memory.
        details: what else `export.json` should say, for JSON.
        wrap: called with the names of the tensors that are written, yields them; for a progress bar.

    Raises:
        AdapterError: the adapter cannot be read or does not fit the base model, or the merged model differs; nothing
            is written then.
        ConfigError: `path` exists, or `dtype` or `max_shard_size` is none.
    """
    check_out(path, overwrite, _source(model_or_dir))
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    check_shard_size(max_shard_size)
    update = _read(model_or_dir, adapter, base)
    update.check_leak()
    name = base or update.base
    check_out(path, overwrite, name, "its base model")
    weights = BaseWeights(name)
    _refuse_quantised(weights)
    with staged_dir(path, overwrite) as staged:
        if why := obstacle(weights, update):
            report = _write_whole(weights, update, staged, dtype, max_shard_size)
            report = replace(report, note=f"base model {name} was loaded as a whole: {why}")
        else:
            report = _write_streaming(weights, update, staged, dtype, max_shard_size, wrap)
        _copy_tokenizer(name, staged)
        logits, why = (
            _compare_logits(weights, update, report, staged, tolerance) if check_logits else (None, _OFF)
        )
        notes = "; ".join(filter(None, (report.note, why)))
        report = replace(report, path=str(path), logits=logits, note=notes)
        write_model_card(update, report.to_json(), staged, details)
    return report


def _source(model_or_dir: Any) -> str:
    if isinstance(model_or_dir, nn.Module):
        return ""
    return str(model_or_dir) if isinstance(model_or_dir, (str, os.PathLike)) else model_or_dir.source


def _read(model_or_dir: Any, adapter: str, base: str | None) -> Update:
    if isinstance(model_or_dir, nn.Module):
        return update_from_model(model_or_dir, adapter)
    return read_update(model_or_dir, base) if isinstance(model_or_dir, (str, os.PathLike)) else model_or_dir


def _refuse_quantised(weights: BaseWeights) -> None:
    configs = weights.config, weights.config.get_text_config()
    if any(getattr(config, "quantization_config", None) for config in configs):
        raise AdapterError(
            f"base model {weights.model}: is quantised, and an update cannot be added to quantised weights without "
            "loss; name the unquantised model as base=… (--base)"
        )


def _write_streaming(
    weights: BaseWeights, update: Update, folder: Path, dtype: str | None, size: int | str, wrap: Wrap
) -> DenseReport:
    merged = MergedTensors(weights, update, DTYPES[dtype] if dtype else None)
    files = write_shards(folder, merged.specs, merged.blocks, size, wrap)
    written = dtype or _usual_dtype(merged.specs)
    config: Any = copy.deepcopy(weights.config)
    if dtype is not None or config.dtype is None:
        config.dtype = getattr(torch, written)
    if config.architectures is None:
        config.architectures = [type(weights.skeleton).__name__]
    if merged.untied:
        set_untied(config)
    config.save_pretrained(folder)
    if found := weights.file(_GENERATION):
        shutil.copyfile(found, folder / _GENERATION)
    elif weights.skeleton.generation_config is not None:
        weights.skeleton.generation_config.save_pretrained(folder)
    return DenseReport(
        str(folder), weights.model, written, merged.differences, merged.untied, True, tuple(files)
    )


def _write_whole(
    weights: BaseWeights, update: Update, folder: Path, dtype: str | None, size: int | str
) -> DenseReport:
    model: Any = load_base(weights.model, "auto")
    check_base(model, update, weights.model)
    untied = untie(model, update)
    replace_extras(model, update)
    differences = merge_whole(model, update)
    if dtype is not None:
        model = model.to(DTYPES[dtype])
    with quiet_transformers(always=False):
        model.save_pretrained(folder, max_shard_size=size)
    files = tuple(sorted(file.name for file in folder.glob("*.safetensors")))
    written = str(model.dtype).removeprefix("torch.")
    return DenseReport(str(folder), weights.model, written, differences, untied, False, files)


def _usual_dtype(specs: Mapping[str, TensorSpec]) -> str:
    """Return the number format that most of the weights have."""
    sizes: Counter[torch.dtype] = Counter()
    for spec in specs.values():
        sizes[spec.dtype] += spec.nbytes if spec.dtype.is_floating_point else 0
    return str(sizes.most_common(1)[0][0]).removeprefix("torch.")


def _copy_tokenizer(name: str, folder: Path) -> None:
    with suppress(OSError, ValueError):  # a base model without a tokenizer gives a merged model without one
        AutoTokenizer.from_pretrained(resolve(name)).save_pretrained(folder)


def _compare_logits(
    weights: BaseWeights, update: Update, report: DenseReport, folder: Path, tolerance: float
) -> tuple[float | None, str]:
    """Compare the logits of the base model with the adapter beside it and of the written model, one after the other."""
    if not isinstance(update, AdapterUpdate):
        return None, "logits not compared: the merged updates are not of low rank"
    stored = weights.config.dtype or torch.float32
    itemsize = max(stored.itemsize, getattr(torch, report.dtype).itemsize)
    if why := no_room(weights.model, itemsize * weights.parameters):
        return None, f"logits not compared: {why}"
    model: Any = load_base(weights.model, "auto")
    untie(model, update)
    expected = adapted_logits(model, update)
    del model
    written = load_base(str(folder), "auto")
    difference = relative_difference(logits_of(written), expected)
    if written.dtype == torch.float32 and not difference <= tolerance:
        raise AdapterError(
            f"{update.source}: the merged model's logits differ by {difference:.1e} of the largest one, more than "
            f"{tolerance:.0e}; nothing was written: raise tolerance=… if that is acceptable"
        )
    return difference, ""
