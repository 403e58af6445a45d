"""HiP-LoRA and Proj-LoRA adapters as plain updates, with their two channels kept apart beside."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from hiplora.adapters.adapter import AdapterUpdate, Channels
from hiplora.adapters.base_weights import BaseWeights, in_precision
from hiplora.adapters.stock import check_extras, check_rank, pattern_value, sort_tensors
from hiplora.errors import AdapterError
from hiplora.spectral import FactorStore, SpectralFactors, protected, retract, soften
from hiplora.tuner.layer import LEAK_LIMIT, LEAK_LIMIT_HALF

_PART = re.compile(r"^(?P<module>.+)\.hiplora_(?P<part>A|B|delta|U|sigma|V|shrink_U|shrink_V)$")
_Parts = dict[str, Tensor]


def hip_update(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str, base: str
) -> AdapterUpdate:
    """Return a saved HiP-LoRA adapter as an update.

    Args:
        config: as in `adapter_config.json`.
        tensors: by name, without PEFT's prefix.
        source: what to call the adapter in messages.
        base: name of the base model; its weights are read only if the adapter was saved without its factors.

    Raises:
        AdapterError: a tensor is missing or has the wrong shape, or the base weight is not the adapter's.
    """
    modules, extras = sort_tensors(tensors, _PART)
    fingerprints = dict(config.get("fingerprints") or {})
    for module in fingerprints:
        if module not in modules:
            raise AdapterError(
                f"{source}: tensor {module}.hiplora_A is missing; the adapter was not saved completely"
            )
    check_extras(extras, config, source)
    saved = config.get("save_factors", True)
    factors_of = None if saved else _recompute(config, fingerprints, source, base)
    channels = {
        module: _channels(module, modules[module], config, source, factors_of) for module in sorted(modules)
    }
    return _assemble(config, channels, fingerprints, extras, source, base)


def live_hip_update(
    model: nn.Module,
    adapter: str,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    source: str,
    base: str,
) -> AdapterUpdate:
    """Return a live model's HiP-LoRA adapter as an update; factors that were not saved come from its layers.

    Raises:
        AdapterError: the model has no such adapter, or a tensor is not usable.
    """
    from hiplora.tuner import hip_layers

    modules, extras = sort_tensors(state, _PART)
    for name, layer in hip_layers(model, adapter):
        layer.ensure_factors(adapter)
        parts = modules.setdefault(name, {})
        for part in ("U", "sigma", "V", "shrink_U", "shrink_V"):
            if adapter in (held := getattr(layer, f"hiplora_{part}")):
                parts[part] = held[adapter].detach().cpu()
    channels = {
        module: _channels(module, modules[module], config, source, None) for module in sorted(modules)
    }
    return _assemble(config, channels, dict(config.get("fingerprints") or {}), extras, source, base)


def _assemble(
    config: Mapping[str, Any],
    channels: dict[str, Channels],
    fingerprints: dict[str, str],
    extras: dict[str, Tensor],
    source: str,
    base: str,
) -> AdapterUpdate:
    if not channels:
        raise AdapterError(f"{source}: no HiP-LoRA tensors in it; nothing was adapted or saved")
    kind = "hiplora" if config.get("principal_channel", True) else "proj-lora"
    factors = {module: parts.factors() for module, parts in channels.items()}
    return AdapterUpdate(base, kind, dict(config), factors, fingerprints, extras, channels, source)


def _channels(
    module: str,
    parts: _Parts,
    config: Mapping[str, Any],
    source: str,
    factors_of: Callable[[str, int], SpectralFactors] | None,
) -> Channels:
    gains = config.get("principal_channel", True)
    needed = ["A", "B", *(["delta"] if gains else []), *(["U", "sigma", "V"] if factors_of is None else [])]
    for part in needed:
        if part not in parts:
            raise AdapterError(
                f"{source}: tensor {module}.hiplora_{part} is missing; the adapter was not saved completely"
            )
    dtype, parts = parts["A"].dtype, {part: tensor.float() for part, tensor in parts.items()}
    k = pattern_value(config.get("principal_rank_pattern"), module, config.get("principal_rank"))
    if not isinstance(k, int):
        k = (config.get("principal_ranks") or {}).get(module)
    if factors_of is not None:
        found = factors_of(module, k)
        parts |= {"U": found.U, "sigma": found.sigma, "V": found.V}
    _check_shapes(module, parts, k, source)
    r = parts["A"].shape[0]
    check_rank(module, r, config, source)
    projected, sides = (
        config.get("residual_projection", True),
        config.get("basis_sides", "both"),
    )
    if (
        factors_of is not None and projected
    ):  # the layer does so too: recomputed factors may differ by rounding
        kept_out = protected(parts["U"], parts["V"], sides)
        parts["A"], parts["B"] = retract(parts["A"], parts["B"], *kept_out)
    if config.get("projection", "hard") == "soft":
        projected = False
        shrinks = parts.get("shrink_U"), parts.get("shrink_V")
        parts["A"], parts["B"] = soften(parts["A"], parts["B"], parts["U"], parts["V"], *shrinks)
    alpha = pattern_value(config.get("alpha_pattern"), module, config.get("lora_alpha", r))
    limit = LEAK_LIMIT.get(dtype, LEAK_LIMIT_HALF) if projected else None
    delta = parts["delta"] if gains else None
    A, B, U, sigma, V = (parts[part] for part in ("A", "B", "U", "sigma", "V"))
    return Channels(A, B, U, sigma, V, delta, alpha / r, limit, sides)


def _check_shapes(module: str, parts: _Parts, k: int, source: str) -> None:
    A, B = parts["A"], parts["B"]
    (r, n), m = A.shape if A.dim() == 2 else (0, 0), B.shape[0] if B.dim() == 2 else 0
    expected = {"A": (r, n), "B": (m, r), "delta": (k,), "U": (m, k), "sigma": (k,), "V": (n, k)}
    expected |= {"shrink_U": (k, k), "shrink_V": (k, k)}
    for part, tensor in parts.items():
        if tensor.shape != expected[part]:
            raise AdapterError(
                f"{source}: tensor {module}.hiplora_{part} is {tuple(tensor.shape)}, expected {expected[part]}; the "
                "configuration and the weights are of different adapters"
            )


def _recompute(
    config: Mapping[str, Any], fingerprints: Mapping[str, str], source: str, base: str
) -> Callable[[str, int], SpectralFactors]:
    """Return a function that factors a base weight as the adapter did, through the store."""
    if not base:
        raise AdapterError(
            f"{source}: was saved without its factors and names no base model; pass base=… (--base)"
        )
    if config.get("basis", "weight") != "weight":
        raise AdapterError(
            f"{source}: was saved without its factors, and basis {config['basis']!r} cannot be recomputed from the "
            "base weights alone; save it with save_factors=True"
        )
    weights, store = BaseWeights(base), FactorStore()
    precision, tolerance = config.get("base_precision", ""), float(config.get("svd_tolerance", 1e-4))

    def factors_of(module: str, k: int) -> SpectralFactors:
        weight = in_precision(weights.weight(module), fingerprints.get(module, ""), precision)
        if weight is None:
            raise AdapterError(
                f"{source}: layer {module}: the weight in {base} is not the one this adapter was made for; saved "
                "without its factors, the adapter needs the very same values: pass the right one as base=… (--base)"
            )
        return store.get_or_compute(weight, k, tolerance, name=module)

    return factors_of
