"""The settings of AlphaEdit, and which layers of a model it edits."""

import math
import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from hiplora.errors import ConfigError

_BLOCK = re.compile(r"^(?P<blocks>.*\.)?(?P<index>\d+)\.mlp\.down_proj$")


@dataclass(frozen=True)
class AlphaEdit:
    """AlphaEdit's settings; the defaults are those of its formula and of its authors' published configurations.

    The authors' rate of the search, `value_lr`, is 0.5 for GPT-J and 0.1 for Llama 3: it is in units of the hidden
    state. Where the record's `search_loss` stays high, raise it.

    `layers` are the blocks whose `mlp.down_proj` is edited, None is five that end at a quarter of the depth (4 to 8 of
    32). `threshold` bounds the null space (see `null_space`), measured on `calibration_tokens` of text. `ridge` is the
    weight of the update's size. The `value_…` settings are of the search for each edit's value: Adam steps, learning
    rate, decay, weight of the divergence on "… is a", and how far the value may move relative to its norm. The
    search and the keys see the prompt bare and behind `prefixes` texts of `prefix_tokens` tokens that the model
    writes. `edits_at_once` are searched together.
    """

    layers: tuple[int, ...] | None = None
    threshold: float = 0.02
    calibration_tokens: int = 10_000
    ridge: float = 1.0
    value_steps: int = 25
    value_lr: float = 0.5
    value_decay: float = 0.5
    value_kl: float = 0.0625
    value_clamp: float = 0.75
    prefixes: int = 5
    prefix_tokens: int = 10
    edits_at_once: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        layers: Any = self.layers
        if layers is not None and not (isinstance(layers, tuple) and all(type(one) is int for one in layers)):
            raise ConfigError(f"layers is {layers!r}; expected a list of the blocks' indices, as [2, 3, 4]")
        least = {
            "value_steps": 2,
            "calibration_tokens": 2,
            "prefixes": 0,
            "prefix_tokens": 1,
            "edits_at_once": 1,
        }
        for name, bound in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < bound:
                raise ConfigError(f"{name} is {value!r}; expected a whole number of at least {bound}")
        for name in ("threshold", "ridge", "value_lr", "value_clamp"):
            if not _number(getattr(self, name)) or getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected a number above 0")
        for name in ("value_decay", "value_kl"):
            if not _number(getattr(self, name)) or getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected a number of at least 0")

    def modules(self, model: nn.Module) -> tuple[list[str], str]:
        """Return the names of the edited weights' modules, in order, and of the block that the last one is in.

        Raises:
            ConfigError: the model is not built like a Llama, or has no block of a chosen index.
        """
        found: dict[int, str] = {}
        for name, module in model.named_modules():
            match = _BLOCK.match(name)
            if match and isinstance(module, nn.Linear):
                found[int(match["index"])] = name
        if len(found) < 2:
            raise ConfigError(
                "the model has no blocks with a linear layer mlp.down_proj; AlphaEdit edits Llama-like models only"
            )
        names = [found[index] for index in self.blocks(len(found))]
        return names, names[-1].removesuffix(".mlp.down_proj")

    def blocks(self, depth: int) -> tuple[int, ...]:
        """Return the indices of the blocks that are edited, of a model with `depth` blocks.

        Raises:
            ConfigError: the model has no block of a chosen index, or none after the last.
        """
        layers = self.layers if self.layers is not None else default_layers(depth)
        if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] > depth - 2:
            raise ConfigError(
                f"layers is {list(layers)}; expected rising indices from 0 to {depth - 2}: the model has "
                f"{depth} blocks, and something must come after the last that is edited"
            )
        return tuple(layers)


def default_layers(depth: int) -> tuple[int, ...]:
    """Return up to five blocks that end at a quarter of the depth: 4 to 8 of 32, as AlphaEdit's authors chose."""
    last = min(round(depth / 4), depth - 2)
    return tuple(range(max(0, last - 4), last + 1))


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
