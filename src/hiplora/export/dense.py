"""Export to a standalone model folder: the adapter added to its base weights once and for all."""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hiplora.errors import AdapterError, ConfigError
from hiplora.export.adapter import AdapterUpdate, Pair
from hiplora.export.base_weights import check_fit, load_base
from hiplora.export.card import write_record
from hiplora.export.check import added, logits_of, relative_difference
from hiplora.export.folder import check_out
from hiplora.export.lora import DTYPES
from hiplora.export.update import read_update
from hiplora.files import staged_dir
from hiplora.models import resolve
from hiplora.models.quiet import quiet_transformers


@dataclass(frozen=True)
class DenseReport:
    """What was written; `logits` is the largest difference between the merged model's logits and the adapter's.

    It is in units of the largest logit; `untied` says that the output head was given a weight of its own.
    """

    path: str
    base: str
    dtype: str
    modules: int
    logits: float
    untied: bool

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready record."""
        return {"schema": 1, "kind": "export", "to": "dense"} | asdict(self)


@torch.no_grad()
def save_dense(
    adapter_dir: str | os.PathLike | AdapterUpdate,
    path: str | os.PathLike,
    base: str | None = None,
    dtype: str | None = None,
    *,
    overwrite: bool = False,
    tolerance: float = 1e-3,
    details: Mapping[str, Any] | None = None,
) -> DenseReport:
    """Write the base model with the adapter merged into it, as a folder that `from_pretrained` loads.

    The base weights are checked against the adapter's fingerprints. Embeddings that were tied are untied where the
    adapter changes one side only. The tokenizer and the generation settings come along.

    Args:
        adapter_dir: an adapter folder or an update.
        path: output folder.
        base: base model, path or name, where the one in the configuration is not to be used.
        dtype: "float32", "bfloat16" or "float16"; None keeps the base model's own.
        overwrite: replace `path` if it exists.
        tolerance: largest accepted difference of a logit, in units of the largest one, for fp32 models; half
            precision rounds the merged weights, and the report says how much that changes.
        details: what else `export.json` should say, for JSON.

    Raises:
        AdapterError: the adapter cannot be read or does not fit the base model, or the merged model differs; nothing
            is written then.
        ConfigError: `path` exists, or `dtype` is unknown.
    """
    source = adapter_dir.source if isinstance(adapter_dir, AdapterUpdate) else str(adapter_dir)
    check_out(path, overwrite, source)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    update = read_update(adapter_dir, base)
    update.check_leak()
    name = base or update.base
    check_out(path, overwrite, name, "its base model")
    model: Any = _load(name)
    check_base(model, update, name)
    untied = _untie(model, update)
    with added(model, update.factors):
        _replace_extras(model, update)
        expected = logits_of(model)
    _merge(model, update.factors)
    if dtype is not None:
        model = model.to(DTYPES[dtype])
    stored = str(model.dtype).removeprefix("torch.")
    logits = relative_difference(logits_of(model), expected)
    if stored == "float32" and not logits <= tolerance:
        raise AdapterError(
            f"{update.source}: the merged model's logits differ by {logits:.1e} of the largest one, more than "
            f"{tolerance:.0e}; nothing was written: raise tolerance=… if that is acceptable"
        )
    report = DenseReport(str(path), name, stored, len(update.factors), logits, untied)
    with staged_dir(path, overwrite) as staged:
        _write(model, name, update, report, staged, details)
    return report


def _load(name: str) -> PreTrainedModel:
    model = load_base(name, "auto")
    if getattr(model, "is_quantized", False):
        raise AdapterError(
            f"base model {name}: is quantised, and an update cannot be added to quantised weights without loss; name "
            "the unquantised model as base=… (--base)"
        )
    return model


def _layer(model: nn.Module, module: str, name: str) -> nn.Module:
    try:
        layer = model.get_submodule(module)
    except AttributeError:
        layer = None
    if not isinstance(layer, (nn.Linear, Conv1D)):
        raise AdapterError(
            f"base model {name}: has no linear layer {module}; the adapter was made for another model: pass the right "
            "one as base=… (--base)"
        )
    return layer


def check_base(model: nn.Module, update: AdapterUpdate, name: str) -> None:
    """Check that a bare model, called `name` in messages, has every adapted layer, with the adapter's base weight.

    Raises:
        AdapterError: a layer is missing, or its weight has another shape or other values.
    """
    for module in update.factors:
        check_fit(_oriented(_layer(model, module, name)), update, module, name)


def _oriented(layer: nn.Module) -> Tensor:
    weight = layer.get_parameter("weight")
    return weight.T if isinstance(layer, Conv1D) else weight


def _untie(model: Any, update: AdapterUpdate) -> bool:
    """Give the output head a weight of its own where the adapter changes one of two tied weights."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embeddings is None or head.weight is not embeddings.weight:
        return False
    changed = {id(model.get_submodule(module).weight) for module in update.factors}
    changed |= {id(model.get_parameter(name)) for name in update.extras if name.endswith(".weight")}
    if id(head.weight) not in changed:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.get_text_config().tie_word_embeddings = False
    model.config.tie_word_embeddings = False
    return True


def _merge(model: nn.Module, factors: Mapping[str, Pair]) -> None:
    for module, (A, B) in factors.items():
        layer: Any = model.get_submodule(module)
        merged = (_oriented(layer).float() + B @ A).to(layer.weight.dtype)
        if not torch.isfinite(merged).all():
            raise AdapterError(
                f"layer {module}: the merged weight overflows {layer.weight.dtype}; pass --dtype float32"
            )
        layer.weight = nn.Parameter(
            (merged.T if isinstance(layer, Conv1D) else merged).contiguous(), requires_grad=False
        )


def _replace_extras(model: nn.Module, update: AdapterUpdate) -> None:
    for name, tensor in update.extras.items():
        try:
            parameter = model.get_parameter(name)
        except AttributeError:
            raise AdapterError(
                f"{update.source}: tensor {name} is for no parameter of the base model"
            ) from None
        if parameter.shape != tensor.shape:
            raise AdapterError(
                f"{update.source}: tensor {name} is {tuple(tensor.shape)}, the base model's {tuple(parameter.shape)}; "
                "a vocabulary that was resized for training must be resized in the base model first"
            )
        parameter.copy_(tensor)


def _write(
    model: PreTrainedModel,
    name: str,
    update: AdapterUpdate,
    report: DenseReport,
    folder: Path,
    details: Mapping[str, Any] | None,
) -> None:
    with quiet_transformers(always=False):
        model.save_pretrained(folder)
    with suppress(OSError, ValueError):  # a base model without a tokenizer gives a merged model without one
        AutoTokenizer.from_pretrained(resolve(name)).save_pretrained(folder)
    write_record(update, report.to_json(), folder, details)
