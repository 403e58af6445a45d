"""The linear layers of a bare model: which ones are meant, and their weights."""

import re
from collections.abc import Collection
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from hiplora.errors import ConfigError
from hiplora.tuner import HipLoraConfig, find_targets


def find_modules(
    model: nn.Module,
    target_modules: str | list[str] | None = None,
    layers: Collection[int] | None = None,
) -> list[str]:
    """Return the names of the layers that an adapter with these target modules would sit on, in the model's order.

    `target_modules` as in PEFT: the ends of names, a regular expression, `"all-linear"`, or None for the usual
    attention projections; `layers` keeps those of some layers only.

    Raises:
        ConfigError: nothing matches, or a layer has no match.
    """
    config = HipLoraConfig(preset="paper", target_modules=target_modules)
    found = [target.name for target in find_targets(model, config)]
    return found if layers is None else of_layers(found, layers)


def of_layers(modules: Collection[str], layers: Collection[int]) -> list[str]:
    """Return those of some modules, by their names, that are in some layers.

    Raises:
        ConfigError: a layer has none of them.
    """
    there = sorted({number for name in modules if (number := layer_of(name)) is not None})
    if missing := sorted(set(layers) - set(there)):
        raise ConfigError(
            f"layer {missing[0]} has none of the modules asked for; they are in {_ranges(there) or 'no numbered layer'}"
        )
    return [name for name in modules if layer_of(name) in layers]


def layer_of(module: str) -> int | None:
    """Return the first number in a module's name, which is that of its layer; None where it has none."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", module)
    return int(found.group(1)) if found else None


def linear_weight(model: nn.Module, name: str) -> tuple[Any, nn.Parameter]:
    """Return a linear layer of a model and its weight as it is stored.

    Raises:
        ConfigError: the model has no such layer, or its weight is none that a matrix can be added to.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ConfigError(f"the model has no layer {name}; name one that it has") from None
    if not isinstance(module, (nn.Linear, Conv1D)):
        raise ConfigError(
            f"layer {name}: is a {type(module).__name__}; directions are of linear layers of a bare model, without "
            "adapters: merge them first, or name another layer"
        )
    weight: Any = module.weight
    if not weight.is_floating_point():
        raise ConfigError(f"layer {name}: holds {weight.dtype} values; load the model without quantisation")
    return module, weight


def _ranges(numbers: list[int]) -> str:
    """Return ascending numbers in words: 0 … 29, or with commas where some are left out."""
    whole = len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]} … {numbers[-1]}" if whole else ", ".join(map(str, numbers))
