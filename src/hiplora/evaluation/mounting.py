"""An adapter or an update on a model for a while, with proof that it acts and that the base comes back."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hiplora.adapters.adapter import Update
from hiplora.adapters.check import quiet_loading
from hiplora.errors import AdapterError, first_line


@contextlib.contextmanager
def mounted(model: nn.Module, folder: str | Path) -> Iterator[Any]:
    """Put an adapter on a bare model for a while and yield the PEFT model; what stays behind is the bare model.

    Raises:
        AdapterError: PEFT cannot load the adapter over this model.
    """
    from peft import PeftModel

    try:
        with quiet_loading():
            adapted = PeftModel.from_pretrained(model, str(folder)).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(
            f"{folder}: cannot be put on the model ({first_line(error)}); check that it is for this base"
        ) from error
    try:
        yield adapted
    finally:
        adapted.unload()


@contextlib.contextmanager
@torch.no_grad()
def applied(model: nn.Module, update: Update) -> Iterator[nn.Module]:
    """Add an update to the weights of a bare model for a while; then the very same weights are back.

    The sum is made in fp32 and rounded to the weights' own precision, as a dense export is.

    Raises:
        AdapterError: the model lacks a module of the update, or its weight has another shape.
    """
    before: dict[str, nn.Parameter] = {}
    try:
        for name in update.modules:
            module, weight = _weight(model, name, update.source)
            delta = update.delta(name).to(weight.device)
            delta = delta.T if isinstance(module, Conv1D) else delta
            if delta.shape != weight.shape:
                raise AdapterError(
                    f"{update.source}: layer {name}: the update is {tuple(delta.shape)}, the weight "
                    f"{tuple(weight.shape)}; it is for another base model"
                )
            before[name] = weight
            # A parameter of its own: a weight that is tied to another one leaves that one alone.
            module.weight = nn.Parameter((weight.float() + delta).to(weight.dtype), requires_grad=False)
        yield model
    finally:
        for name, weight in before.items():
            model.get_submodule(name).weight = weight


@contextlib.contextmanager
def holding(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Have these very weights in the named layers of a model for a while; then those that it had."""
    changed: dict[str, Any] = {name: model.get_submodule(name).weight for name in weights}
    try:
        for name, weight in weights.items():
            model.get_submodule(name).weight = weight
        yield
    finally:
        for name, weight in changed.items():
            model.get_submodule(name).weight = weight


def check_acts(base: Tensor, on: Tensor, off: Tensor, name: str) -> None:
    """Check a mounted adapter by logits of the same tokens: the base's, with it on, and with it off.

    Raises:
        AdapterError: with it off they are not the base's bit for bit, or with it on they are.
    """
    if not torch.equal(base, off):
        raise AdapterError(
            f"{name}: with the adapter off the model is not the base bit for bit, so its scores could not be compared; "
            "adapters that move the base weights when they load (PiSSA and the like) must be saved as plain LoRA first "
            "(path_initial_model_for_weight_conversion)"
        )
    if torch.equal(base, on):
        raise AdapterError(
            f"{name}: changes no logit: it is not active or was never trained, and its scores would be the "
            "base's; check that it is for this model and that training took steps"
        )


def _weight(model: nn.Module, name: str, source: str) -> tuple[Any, nn.Parameter]:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise AdapterError(f"{source}: the model has no layer {name}; it is for another base model") from None
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        raise AdapterError(
            f"{source}: the weight of layer {name} is no matrix of floats, so nothing can be added to it"
        )
    return module, weight
