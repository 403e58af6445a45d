"""Which linear layers of a model an adapter sits on: the preset's, found by role, or those of a configuration."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
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
from torch import Tensor, nn
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
    """A linear layer to adapt: its `shape` (m, n) = (out, in), and the principal rank `k` as it was requested."""

    name: str
    shape: tuple[int, int]
    k: RankSpec


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
        names = [name for name in _base_modules(model) if check_target_module_exists(chosen, name)]
    except re.error as error:
        raise ConfigError(f"target_modules {config.target_modules!r}: {error}") from error  # type: ignore[attr-defined]
    if not names:
        raise ConfigError(
            f"target_modules {config.target_modules!r} match no module of {type(model).__name__}, or all that match "
            "are excluded; name some of its linear layers"  # type: ignore[attr-defined]
        )
    patterns, default = getattr(chosen, "principal_rank_pattern", {}), getattr(chosen, "principal_rank", 0)
    ranks = {name: for_module(patterns, name, default) for name in names}
    return [linear_target(model.get_submodule(name), name, k) for name, k in ranks.items()]


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
    return Target(name, (m, n), k)


def is_linear(module: nn.Module) -> bool:
    """Whether a module without adapters multiplies by one weight matrix, quantised or not."""
    return isinstance(module, (nn.Linear, Conv1D)) or resolve_quantization_backend(module) is not None


def frozen_weight(module: nn.Module) -> Tensor:
    """Return the base weight of a linear layer, adapted or not, as (m, n), dequantised where needed."""
    base: Any = _base(module)
    backend = resolve_quantization_backend(base)
    weight = base.weight.data if backend is None else backend.get_base_weight(base)
    return weight.T if isinstance(base, Conv1D) else weight


def precision(module: nn.Module) -> str:
    """Name how the base weight of a linear layer is stored: a dtype, or the quantisation backend."""
    base: Any = _base(module)
    backend = resolve_quantization_backend(base)
    return str(base.weight.dtype).removeprefix("torch.") if backend is None else backend.backend_name


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
    modules = _base_modules(model)
    candidates = [name for name in modules if belongs(name.lower().split("."))]
    chosen = [name for name in candidates if is_linear(_base(modules[name]))]
    if not chosen:
        raise ConfigError(
            f"target_modules is not set, and no {role} projections were recognised in {type(model).__name__}; set it "
            "to a list of module names, a regular expression or 'all-linear'"
        )
    # Each by the fewest trailing parts of its name which no other module's name ends with.
    others = {tail for name in modules.keys() - set(chosen) for tail in _tails(name)}
    return list(dict.fromkeys(next(tail for tail in _tails(name) if tail not in others) for name in chosen))


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


def _base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the named modules of the base model; what is inside an adapted layer is not one."""
    named = dict(model.named_modules())
    inside = tuple(f"{name}." for name, module in named.items() if isinstance(module, BaseTunerLayer))
    return {name: module for name, module in named.items() if name and not name.startswith(inside)}


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _tails(name: str) -> list[str]:
    """Return the ends of a name, from its last part to the whole."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in reversed(range(len(parts)))]
