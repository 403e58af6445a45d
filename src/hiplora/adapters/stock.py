"""Stock LoRA adapters as plain updates, and an error for those that are something else."""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hiplora.adapters.adapter import AdapterUpdate, Pair
from hiplora.errors import AdapterError

_NOT_PLAIN = {
    "use_dora": "DoRA rescales the merged weight",
    "lora_bias": "its LoRA layers have biases",
    "target_parameters": "it adapts bare parameters",
    "trainable_token_indices": "it trains single token embeddings",
    "alora_invocation_tokens": "aLoRA acts on some tokens only",
    "use_qalora": "QALoRA pools its inputs",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "arrow_config": "Arrow routes between adapters",
    "kasa_config": "KaSA changes the base weights",
    "monteclora_config": "MonteCLoRA samples its factors",
    "layer_replication": "it repeats layers of the base model",
}
# These initialisations subtract B₀A₀ from the base weights: the saved factors alone are no update of them.
_REBASING = ("pissa", "olora", "corda", "loftq", "lora_ga")
# PEFT saves a copy of an adapted output head's frozen weight beside its factors.
FROZEN_COPY = ".base_layer."
_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<part>[AB])\.weight$")
_EXPECTED = {"A": "lora_A.weight", "B": "lora_B.weight"}


def stock_update(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str, base: str
) -> AdapterUpdate:
    """Return a stock LoRA adapter as an update, its scaling baked into `B'`.

    Args:
        config: as in `adapter_config.json`.
        tensors: by name, without PEFT's prefix.
        source: what to call the adapter in messages.
        base: name of the base model.

    Raises:
        AdapterError: not a plain low-rank update, or a tensor is missing or has the wrong shape.
    """
    check_plain(config, source)
    _check_start(config, source)
    found, extras = sort_tensors(tensors, _FACTOR)
    check_extras(extras, config, source)
    factors = {module: _pair(module, pair, config, source) for module, pair in sorted(found.items())}
    if not factors:
        raise AdapterError(f"{source}: no lora_A and lora_B tensors in it; nothing was adapted or saved")
    return AdapterUpdate(base, "lora", dict(config), factors, {}, extras, {}, source)


def sort_tensors(
    tensors: Mapping[str, Tensor], pattern: re.Pattern[str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Sort tensors into those of adapted modules, by module and part, and the rest; frozen copies are left out.

    `pattern` has the groups `module` and `part`.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    extras: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if match := pattern.match(name):
            modules.setdefault(match["module"], {})[match["part"]] = tensor
        elif FROZEN_COPY not in name:
            extras[name] = tensor
    return modules, extras


def check_extras(extras: Mapping[str, Tensor], config: Mapping[str, Any], source: str) -> None:
    """Refuse tensors that are neither factors nor part of `modules_to_save`.

    Raises:
        AdapterError: naming the first such tensor.
    """
    saved = config.get("modules_to_save") or []
    for name in extras:
        if not any(owner.endswith(part) for owner in _owners(name) for part in saved):  # as PEFT matches them
            raise AdapterError(
                f"{source}: tensor {name} is neither a LoRA factor of a linear layer nor in modules_to_save "
                f"({', '.join(saved) or 'none'}); adapters of embeddings, biases or a resized vocabulary are not "
                "plain updates: merge it with PEFT instead"
            )


def _owners(name: str) -> list[str]:
    """Return the modules that a parameter is in, from the innermost out."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def pattern_value(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Return what a PEFT pattern (`rank_pattern`, `alpha_pattern`, …) says for a module."""
    from peft.utils.other import get_pattern_key

    pattern = pattern or {}
    return pattern.get(get_pattern_key(list(pattern), module), default)


def check_rank(module: str, found: int, config: Mapping[str, Any], source: str) -> None:
    """Refuse a factor whose rank is not the configured one, since its scaling would be wrong.

    Raises:
        AdapterError: naming the module and both ranks.
    """
    expected = pattern_value(config.get("rank_pattern"), module, config.get("r"))
    if found != expected:
        raise AdapterError(
            f"{source}: layer {module}: rank {found}, but the configuration says {expected}; the configuration and "
            "the weights are of different adapters"
        )


def check_plain(config: Mapping[str, Any], source: str) -> None:
    """Refuse configurations under which a LoRA-like adapter does more than add `B'A'` to linear layers.

    Raises:
        AdapterError: naming what it does, and the way out.
    """
    reasons = [reason for key, reason in _NOT_PLAIN.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        reasons.append(f"bias={config['bias']!r} trains biases of the base model")
    if reasons:
        raise AdapterError(
            f"{source}: not a plain low-rank update: {'; '.join(reasons)}. Merge it into the base model with PEFT "
            "(merge_and_unload), or train it as plain LoRA"
        )


def _check_start(config: Mapping[str, Any], source: str) -> None:
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_REBASING):
        raise AdapterError(
            f"{source}: init_lora_weights={start!r} moves the base weights, so its saved factors are no update of "
            "them; save it with model.save_pretrained(path, path_initial_model_for_weight_conversion=…), which "
            "writes the difference as plain LoRA"
        )


def _pair(module: str, parts: Mapping[str, Tensor], config: Mapping[str, Any], source: str) -> Pair:
    for factor, name in _EXPECTED.items():
        if factor not in parts:
            raise AdapterError(
                f"{source}: tensor {module}.{name} is missing; the adapter was not saved completely"
            )
    A, B = parts["A"].float(), parts["B"].float()
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
        raise AdapterError(
            f"{source}: layer {module}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are not factors of a "
            "linear layer; only linear layers can be read as plain updates"
        )
    r = A.shape[0]
    check_rank(module, r, config, source)
    alpha = pattern_value(config.get("alpha_pattern"), module, config.get("lora_alpha", r))
    scaling = alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r
    return A, scaling * B
