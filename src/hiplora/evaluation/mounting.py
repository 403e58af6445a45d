"""Adapters and updates put on a base model for a while, with checks that they act and come off again."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hiplora.adapters import AdapterUpdate, attached, linear_layer
from hiplora.errors import AdapterError, ConfigError, first_line
from hiplora.evaluation.drift import DIVERGED
from hiplora.positions import within_context
from hiplora.tuner.experts import unrolled

BASE = "base"  # the base model's name in results, which no adapter may have


def load_model(model: str, device: str = "auto") -> tuple[Any, Any]:
    """Load a model and its tokenizer for measuring, with the device and precision of `measuring_place`.

    Its weights take no gradients, as PEFT leaves a base after removing an adapter: products round differently with and
    without gradients, and the base must score the same before and after.
    """
    from hiplora.devices import measuring_place
    from hiplora.models import load

    place, dtype = measuring_place(device)
    network, tokenizer = load(model, dtype)
    return network.to(place).requires_grad_(False), tokenizer


def name_adapters(adapters: Sequence[str | os.PathLike]) -> dict[str, Path]:
    """Return name → folder of adapters given as FOLDER or NAME=FOLDER; the name is by default the folder's.

    ConfigError if a name is taken, or a folder holds no adapter.
    """
    folders: dict[str, Path] = {}
    for adapter in adapters:
        folder = Path(adapter)
        name, equals, rest = os.fspath(adapter).partition("=")
        if equals and not folder.exists():
            folder = Path(rest)
        else:
            name = folder.resolve().name
        if not (folder / "adapter_config.json").is_file():
            what = "holds no adapter_config.json" if folder.is_dir() else "no such folder"
            raise ConfigError(f"adapter {folder}: {what}; expected an adapter folder, or NAME=FOLDER")
        if name in {BASE, *folders}:
            raise ConfigError(f"adapter {adapter}: the name {name!r} is taken; give it another, as NAME=FOLDER")
        folders[name] = folder
    return folders


@contextlib.contextmanager
def mounted(model: nn.Module, folder: str | Path | None) -> Iterator[Any]:
    """Put an adapter on a bare model inside the block, as `attached` does; None yields the bare model.

    AdapterError also if the model cannot read plain text with the adapter.
    """
    if folder is None:
        yield model
        return
    with attached(model, folder) as adapted:
        try:
            with torch.no_grad():
                adapted(input_ids=torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device))
        except Exception as error:  # a method that needs more than text, as Poly its task, or damaged tensors
            kind = getattr(adapted.peft_type, "value", adapted.peft_type)
            what = f"{kind} fails on plain text ({first_line(error)})"
            raise AdapterError(f"{folder}: {what}; it cannot be measured") from error
        yield adapted


@contextlib.contextmanager
def applied(model: nn.Module, update: AdapterUpdate) -> Iterator[nn.Module]:
    """Add an update to the weights of a bare model inside the block; restore the very same weights on exit.

    The sum is made in fp32 and rounded to the weights' precision, as in a dense export. AdapterError if the model lacks
    a module of the update, or has it in another shape.
    """
    with unrolled(model), holding(model, _changed(model, update)):
        yield model


def _changed(model: nn.Module, update: AdapterUpdate) -> dict[str, nn.Parameter]:
    changed: dict[str, nn.Parameter] = {}
    for name in update.modules:
        layer: Any = linear_layer(model, name, update.base)
        weight, delta = layer.weight.detach(), update.delta(name)
        delta = (delta.T if isinstance(layer, Conv1D) else delta).to(weight.device)
        if delta.shape != weight.shape:
            raise AdapterError(
                f"{update.source}: layer {name}: the update is {tuple(delta.shape)}, the weight "
                f"{tuple(weight.shape)}; it is for another base model"
            )
        # A new parameter: a weight that is tied to this one stays as it is.
        changed[f"{name}.weight"] = nn.Parameter((weight.float() + delta).to(weight.dtype), requires_grad=False)
    if unfit := unfit_extras(model, update):
        raise AdapterError(
            f"{update.source}: {unfit[0]} has another shape than the base model's, or the base has none (a resized "
            "vocabulary, or another kind of model), so the two cannot be compared token by token; export it with "
            "hiplora export --to dense, and use that as a model"
        )
    for name, tensor in update.extras.items():
        changed[name] = nn.Parameter(tensor.to(model.get_parameter(name)), requires_grad=False)
    return changed


def unfit_extras(model: nn.Module, update: AdapterUpdate) -> list[str]:
    """Return the parameters that an update replaces whole and that the model lacks, or has in another shape."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    return [name for name, tensor in update.extras.items() if shapes.get(name) != tensor.shape]


@contextlib.contextmanager
def holding(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Use these very parameters inside the block, by name; restore the model's own on exit."""

    def put(replacements: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in replacements.items():
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, parameter)

    originals = {name: model.get_parameter(name) for name in parameters}
    try:
        put(parameters)
        yield
    finally:
        put(originals)


@torch.no_grad()
def probe(network: Any, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Return the logits (fp32, on the CPU) at the first 64 tokens of each prompt: (tokens, vocabulary)."""
    logits, length = [], within_context(64, network)
    for prompt in prompts:
        ids = tokenizer(prompt or tokenizer.eos_token or " ", return_tensors="pt")["input_ids"][:, :length]
        logits.append(network(input_ids=ids.to(network.device), use_cache=False).logits[0].float().cpu())
    return torch.cat(logits)


def check_adapters(
    network: Any, tokenizer: Any, prompts: Sequence[str], puts: Mapping[str, AbstractContextManager[Any]]
) -> None:
    """Check on a few prompts that each adapter or update (`mounted`, `applied`) acts, and that the base comes back.

    AdapterError if the logits with it off are not the base's bit for bit, or with it on they are.
    """
    base = probe(network, tokenizer, prompts)
    for name, put in puts.items():
        with put as adapted:
            on = probe(adapted, tokenizer, prompts)
        _check_acts(base, on, probe(network, tokenizer, prompts), name)


def _check_acts(base: Tensor, on: Tensor, off: Tensor, name: str) -> None:
    if not torch.equal(base, off):
        raise AdapterError(
            f"{name}: with the adapter off the model is not the base bit for bit, so its scores could not be "
            "compared; adapters that change the base weights on loading (PiSSA and the like) must be saved as plain "
            "LoRA first (path_initial_model_for_weight_conversion)"
        )
    if not torch.isfinite(on).all():
        raise AdapterError(f"{name}: makes the model's logits NaN or Inf; {DIVERGED}")
    if torch.equal(base, on):
        raise AdapterError(
            f"{name}: changes no logit: it is not active or was never trained, and its scores would be the "
            "base's; check that it is for this model and that training took steps"
        )
