"""HiP-LoRA adapters as plain updates, with their two channels kept apart beside."""

from collections.abc import Callable
from typing import Any

from hiplora.adapters.base import BaseWeights, in_precision
from hiplora.adapters.formats import Parts, Saved
from hiplora.adapters.update import AdapterUpdate, Channels
from hiplora.spectral import FactorStore, SpectralFactors, protected, retract, soften
from hiplora.tuner import hip_layers, leak_limit


def hip_update(saved: Saved) -> AdapterUpdate:
    """Return a HiP-LoRA adapter as an update of kind "hiplora".

    Factors that were not saved are taken from the live model's layers, or computed from the base weights.
    """
    modules, extras = saved.sort(r"hiplora_(?P<part>A|B|delta|U|sigma|V|shrink_U|shrink_V)(\.weight)?")
    recomputed = None
    if saved.model is not None:
        for name, layer in hip_layers(saved.model, saved.adapter):
            layer.ensure_factors(saved.adapter)
            for part in ("U", "sigma", "V", "shrink_U", "shrink_V"):
                if saved.adapter in (held := getattr(layer, f"hiplora_{part}")):
                    modules.setdefault(name, {})[part] = held[saved.adapter].detach().cpu()
    else:
        for module in saved.fingerprints:
            saved.check_complete(module, modules.get(module, {}), ["A"], "hiplora_{}")
        recomputed = None if saved.config.get("save_factors", True) else _recomputed(saved)
    channels = {module: _channels(saved, module, parts, recomputed) for module, parts in sorted(modules.items())}
    factors = {module: parts.factors() for module, parts in channels.items()}
    config = dict(saved.config)
    return AdapterUpdate(saved.base, "hiplora", config, factors, saved.fingerprints, extras, channels, saved.source)


def _channels(
    saved: Saved, module: str, tensors: Parts, recomputed: Callable[[str, int], SpectralFactors] | None
) -> Channels:
    config, gains = saved.config, saved.config.get("principal_channel", True)
    needed = ["A", "B", *(["delta"] if gains else []), *([] if recomputed else ["U", "sigma", "V"])]
    saved.check_complete(module, tensors, needed, "hiplora_{}")
    parts = {part: tensor.float() for part, tensor in tensors.items()}
    k = saved.setting("principal_rank_pattern", module, config.get("principal_rank"))
    if not isinstance(k, int):
        k = (config.get("principal_ranks") or {}).get(module)
    if recomputed is not None:
        found = recomputed(module, k)
        parts |= {"U": found.U, "sigma": found.sigma, "V": found.V}
    A, B = parts["A"], parts["B"]
    (r, n), m = A.shape if A.dim() == 2 else (0, 0), B.shape[0] if B.dim() == 2 else 0
    expected = {"A": (r, n), "B": (m, r), "delta": (k,), "U": (m, k), "sigma": (k,), "V": (n, k)}
    for part, tensor in parts.items():
        if tensor.shape != (shape := expected.get(part, (k, k))):  # shrink_U and shrink_V
            raise saved.error(
                f"tensor {module}.hiplora_{part} is {tuple(tensor.shape)}, expected {shape}; the configuration and "
                "the weights are of different adapters"
            )
    saved.check_rank(module, r)
    projected, sides = config.get("residual_projection", True), config.get("basis_sides", "both")
    if recomputed is not None and projected:  # as the layer does: recomputed factors may differ by rounding
        kept_out = protected(parts["U"], parts["V"], sides)
        parts["A"], parts["B"] = retract(parts["A"], parts["B"], *kept_out)
    if config.get("projection", "hard") == "soft":
        projected = False
        shrinks = parts.get("shrink_U"), parts.get("shrink_V")
        parts["A"], parts["B"] = soften(parts["A"], parts["B"], parts["U"], parts["V"], *shrinks)
    alpha = saved.setting("alpha_pattern", module, config.get("lora_alpha", r))
    limit = leak_limit(tensors["A"].dtype) if projected else None
    A, B, U, sigma, V = (parts[part] for part in ("A", "B", "U", "sigma", "V"))
    return Channels(A, B, U, sigma, V, parts["delta"] if gains else None, alpha / r, limit, sides)


def _recomputed(saved: Saved) -> Callable[[str, int], SpectralFactors]:
    """Return a function for the factors of the base weights as the adapter had them, through the cache."""
    config: Any = saved.config
    weights, store = BaseWeights(saved.base), FactorStore()

    def factors(module: str, k: int) -> SpectralFactors:
        fingerprint, precision = saved.fingerprints.get(module, ""), config.get("base_precision") or ""
        weight = in_precision(weights.weight(module), fingerprint, precision)
        if weight is None:
            raise saved.error(
                f"layer {module}: the weight in {saved.base} is not the one this adapter was made for; saved "
                "without its factors, the adapter needs the very same values: pass the right one as base=… (--base)"
            )
        return store.get_or_compute(weight, k, float(config.get("svd_tolerance", 1e-4)), name=module)

    return factors
