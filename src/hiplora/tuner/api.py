"""What a user calls on a model that carries HiP-LoRA adapters."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hiplora.errors import AdapterError
from hiplora.spectral import weight_fingerprint
from hiplora.tuner.layer import HipLoraLinear
from hiplora.tuner.state import other_weights
from hiplora.tuner.targets import check_unmerged, frozen_weight, precision


def hip_layers(model: nn.Module) -> Iterator[tuple[str, HipLoraLinear]]:
    """Yield (name in the base model, layer) for each layer of HiP-LoRA adapters; AdapterError if there is none."""
    layers = [module for module in model.modules() if isinstance(module, HipLoraLinear) and module.hiplora_A]
    if not layers:
        raise AdapterError(
            "the model has no HiP-LoRA adapter; add one with peft.get_peft_model or PeftModel.from_pretrained"
        )
    yield from ((layer.name, layer) for layer in layers)


def stability_penalty(model: nn.Module) -> Tensor:
    """Return Σ_modules R(δ) of the active adapters (Eq. 6), a differentiable scalar without λ.

    For `stability_mode="none"`: add `λ * stability_penalty(model)` to the loss. In the other modes the optimizer hooks
    already apply the budget. AdapterError: no active adapter has a principal channel.
    """
    active = [(layer, name) for _, layer in hip_layers(model) for name in layer.active_adapters]
    terms = [layer.stability_penalty(name) for layer, name in active if name in layer.hiplora_delta]
    if not terms:
        raise AdapterError("no active HiP-LoRA adapter has a principal channel, so there is nothing to penalise")
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


def retract_(model: nn.Module) -> None:
    """Put every adapter's residual factors back into the complement now, in place (Eq. 4); idempotent."""
    for _, layer in hip_layers(model):
        for adapter in layer.hiplora_A:
            layer.retract_(adapter)


def max_leak(model: nn.Module) -> float:
    """Return the largest relative ‖UᵀB‖/‖B‖ or ‖AV‖/‖A‖ over all modules and adapters.

    It is rounding after steps of an optimizer that holds the model's parameters. Steps on copies of them (DeepSpeed)
    are not retracted: the factors leave the complement, and act and are saved through the projection.
    """
    return max(layer.leak(adapter) for _, layer in hip_layers(model) for adapter in layer.hiplora_A)


def verify_base(model: nn.Module) -> None:
    """Compare all values of every adapted weight with those that its adapters were made for: loading compares some.

    AdapterError if they differ, at the same precision; at another one the adapters' factors have decided.
    """
    for name, layer in hip_layers(model):
        check_unmerged(layer, name)
        fingerprint = weight_fingerprint(frozen_weight(layer), name)
        for config in layer.configs.values():
            if config.fingerprints[name] != fingerprint and config.base_precision == precision(layer):
                raise other_weights([name], config)
