"""A merge into a model that is in memory as a whole: for base models that are not stored as safetensors."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hiplora.adapters.adapter import AdapterUpdate, Update
from hiplora.adapters.base_weights import check_fit, is_tied, linear_layer
from hiplora.adapters.check import MergeCheck, added, logits_of
from hiplora.adapters.shards import row_blocks
from hiplora.adapters.streaming import check_extra, merged_blocks
from hiplora.errors import AdapterError


def check_base(model: nn.Module, update: Update, name: str) -> None:
    """Check that a bare model, called `name` in messages, has every adapted layer, with the adapter's base weight.

    Raises:
        AdapterError: a layer is missing, or its weight has another shape or other values.
    """
    for module in update.modules:
        layer = linear_layer(model, module, name)
        weight = layer.get_parameter("weight")
        check_fit(weight.T if isinstance(layer, Conv1D) else weight, update, module, name)


def untie(model: Any, update: Update) -> bool:
    """Give the output head a weight of its own where the adapter changes one of two tied weights."""
    if not is_tied(model):
        return False
    head = model.get_output_embeddings()
    changed = {id(model.get_submodule(module).weight) for module in update.modules}
    changed |= {id(model.get_parameter(name)) for name in update.extras if name.endswith(".weight")}
    if id(head.weight) not in changed:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    set_untied(model.config)
    return True


def set_untied(config: Any) -> None:
    """Say in a model's configuration that its output head has a weight of its own."""
    config.get_text_config().tie_word_embeddings = False
    config.tie_word_embeddings = False


@torch.no_grad()
def replace_extras(model: nn.Module, update: Update) -> None:
    """Put the tensors of `modules_to_save` in the place of the model's own.

    Raises:
        AdapterError: the model has no such parameter, or it has another shape.
    """
    for name, tensor in update.extras.items():
        try:
            parameter = model.get_parameter(name)
        except AttributeError:
            raise AdapterError(
                f"{update.source}: tensor {name} is for no parameter of the base model"
            ) from None
        check_extra(name, tensor, parameter.shape, update.source)
        parameter.copy_(tensor)


def adapted_logits(model: nn.Module, update: AdapterUpdate) -> Tensor:
    """Return the logits of an untied model with an update beside its layers; its extras are replaced for good."""
    with added(model, update.factors):
        replace_extras(model, update)
        return logits_of(model)


@torch.no_grad()
def merge_whole(model: nn.Module, update: Update) -> dict[str, float]:
    """Add an update to a model's weights; return `MergeCheck.difference` of each module.

    Raises:
        AdapterError: a value overflows the model's number format, or a sum is wrong.
    """
    differences = {}
    for module in update.modules:
        layer: Any = model.get_submodule(module)
        old, check = layer.weight, MergeCheck(update, module, isinstance(layer, Conv1D))
        parts = [old[rows] for rows in row_blocks(old.shape)]
        merged = torch.cat(list(merged_blocks(update, check, parts, old.dtype)))
        layer.weight = nn.Parameter(merged, requires_grad=False)
        differences[module] = check.difference
    return differences
