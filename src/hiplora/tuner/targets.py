"""Which linear layers of a model an adapter sits on: the preset's, found by role, or those of a configuration."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _get_in_out_features,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import resolve_quantization_backend
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from hiplora.errors import ConfigError
from hiplora.spectral import RankSpec

# Parts of a module's path, lower case. A projection of an MLP is a linear layer in a numbered block, outside attention,
# that lies in an MLP container or has the name of an MLP projection.
_ATTENTION = re.compile(r".*attn.*|.*attention.*")
_MLP_CONTAINER = re.compile(
    r"mlp|.*_mlp|mlp_.*|ffn?s?|ffn_.*|.*feed_?forward.*|densereludense|experts?|shared_experts?"
)
_MLP_PROJECTION = re.compile(
    r"(gate|up|down|gate_up|up_gate)_proj|fc_?\d|fc_(in|out)|c_fc(_\d)?|dense_(h_to_4h|4h_to_h)|ffn|ffn_output"
    r"|w[io](_\d)?|w[123]|lin[12]|linear_?[12]"
)
_MLP_PAIRS = {("intermediate", "dense"), ("output", "dense")}  # BERT and its descendants
_ROUTER = re.compile(r"gate|router|.*_gate|.*router.*")


@dataclass(frozen=True)
class Target:
    """A linear layer to adapt.

    `shape` is (m, n) = (out, in), `k` the principal rank as it was requested, `transposed` says that the weight is
    stored as (in, out).
    """

    name: str
    shape: tuple[int, int]
    k: RankSpec
    transposed: bool

    @property
    def kind(self) -> str:
        """The module's own name, the same in every layer: `q_proj`."""
        return self.name.rpartition(".")[2]


def find_targets(model: nn.Module, config: PeftConfig) -> list[Target]:
    """Return the layers that an adapter of this configuration would sit on, in the model's order.

    `config` may be of any PEFT method with `target_modules`; where it names none, they are those of its `preset`.

    Raises:
        ConfigError: no module matches, or one that does is not a linear layer.
    """
    chosen: Any = copy.copy(config)
    if chosen.target_modules is None:
        chosen.target_modules = set(default_targets(model, getattr(chosen, "preset", "function-aware")))
    _maybe_include_all_linear_layers(chosen, model)
    try:
        names = [name for name, _ in _base_modules(model) if check_target_module_exists(chosen, name)]
    except re.error as error:
        raise ConfigError(f"target_modules {config.target_modules!r}: {error}") from error  # type: ignore[attr-defined]
    if not names:
        raise ConfigError(
            f"target_modules {config.target_modules!r} match no module of {type(model).__name__}, or all that match "
            "are excluded; name some of its linear layers"  # type: ignore[attr-defined]
        )
    patterns = getattr(chosen, "principal_rank_pattern", {})
    default = getattr(chosen, "principal_rank", 0)
    return [
        linear_target(model.get_submodule(name), name, for_module(patterns, name, default)) for name in names
    ]


def linear_target(module: nn.Module, name: str, k: RankSpec = 0) -> Target:
    """Describe a linear layer, adapted already or not.

    Raises:
        ConfigError: the module is not a linear layer.
    """
    base = _base(module)
    n, m = _get_in_out_features(base) if is_linear(base) else (None, None)
    if m is None or n is None:
        raise ConfigError(
            f"layer {name}: HiP-LoRA adapts linear layers, and this is a {type(base).__name__}; "
            "leave it out with exclude_modules, or train it whole with modules_to_save"
        )
    return Target(name, (m, n), k, isinstance(base, Conv1D))


def is_linear(module: nn.Module) -> bool:
    """Whether a module without adapters multiplies by one weight matrix, quantised or not."""
    return isinstance(module, (nn.Linear, Conv1D)) or resolve_quantization_backend(module) is not None


def for_module(pattern: dict[str, Any], name: str, default: Any) -> Any:
    """Return a module's own value from one of PEFT's patterns (`rank_pattern`), else the default."""
    return pattern.get(get_pattern_key(list(pattern), name), default)


def default_targets(model: nn.Module, preset: str = "function-aware") -> list[str]:
    """Return the `target_modules` of a preset for this model: its MLP projections, or the paper's attention ones.

    The names are as short as they can be without matching another module.

    Raises:
        ConfigError: the model has none that can be recognised.
    """
    role, belongs = _ROLES[preset]
    candidates = {name: module for name, module in _base_modules(model) if belongs(name.lower().split("."))}
    chosen = [name for name, module in candidates.items() if is_linear(_base(module))]
    if not chosen:
        raise ConfigError(
            f"target_modules is not set, and no {role} projections were recognised in {type(model).__name__}; set it "
            "to a list of module names, a regular expression or 'all-linear'"
        )
    return _shortest(chosen, [name for name, _ in _base_modules(model)])


def _in_mlp(path: Sequence[str]) -> bool:
    *parents, own = path
    if not any(part.isdigit() for part in parents) or any(map(_ATTENTION.fullmatch, parents)):
        return False
    if _ROUTER.fullmatch(own):
        return False
    named = _MLP_PROJECTION.fullmatch(own) is not None or (parents[-1], own) in _MLP_PAIRS
    return named or any(map(_MLP_CONTAINER.fullmatch, parents))


def _in_attention(path: Sequence[str]) -> bool:
    *parents, own = path
    numbered = any(part.isdigit() for part in parents)
    return numbered and any(map(_ATTENTION.fullmatch, parents)) and not _ROUTER.fullmatch(own)


_ROLES: dict[str, tuple[str, Callable[[Sequence[str]], bool]]] = {
    "function-aware": ("MLP", _in_mlp),
    "paper": ("attention", _in_attention),
}


def _base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the named modules of the base model; what is inside an adapted layer is not one."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(inside or "\0"):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, f"{name}.")
        yield name, module


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _shortest(chosen: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the fewest trailing parts of the chosen names which no other name ends with."""
    wanted = set(chosen)
    others = {tail for name in names if name not in wanted for tail in _tails(name)}
    return list(dict.fromkeys(next(tail for tail in _tails(name) if tail not in others) for name in chosen))


def _tails(name: str) -> list[str]:
    """Return the ends of a name, from its last part to the whole."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in reversed(range(len(parts)))]
