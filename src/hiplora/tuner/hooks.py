"""Budget and retraction in any training loop, through torch's global optimizer hooks.

Just before a step the gradient of λ·R(δ) is added to the gains' gradients; just after it the gains are shrunk (proximal
mode) and the residual factors return to the complement. Gains with a learning rate or a scale of their own change their
variable for the time of the step. Optimizers without HiP-LoRA parameters are left alone. A step that an AMP scaler or
an accumulation wrapper skips never reaches the hooks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from hiplora.spectral import penalty_gradient, proximal_step
from hiplora.spectral.precision import full_precision
from hiplora.tuner.gains import Gains
from hiplora.tuner.layer import HipLoraLinear

_layers: weakref.WeakSet[HipLoraLinear] = weakref.WeakSet()
_handles: list[Any] = []
_stepping: weakref.WeakKeyDictionary[Optimizer, list[Gains]] = weakref.WeakKeyDictionary()


def watch(layer: HipLoraLinear) -> None:
    """Let the hooks serve this layer; installs them on first use."""
    _layers.add(layer)
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(_before_step))
        _handles.append(register_optimizer_step_post_hook(_after_step))


def _owned(optimizer: Optimizer) -> Iterator[tuple[HipLoraLinear, str, Any]]:
    """Yield (layer, adapter, learning rate) for every adapter that has a trainable parameter in `optimizer`."""
    rates = {id(p): group.get("lr", 0.0) for group in optimizer.param_groups for p in group["params"]}
    for layer in _layers:
        for adapter in layer.hiplora_A:
            held = [
                rates[id(parameters[adapter])]
                for parameters in (layer.hiplora_delta, layer.hiplora_A, layer.hiplora_B)
                if adapter in parameters
                and id(parameters[adapter]) in rates
                and parameters[adapter].requires_grad
            ]
            if held:
                yield layer, adapter, held[0]


def _before_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    # torch passes the optimizer itself as the first positional argument.
    closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
    gains = _stepping[optimizer] = [
        Gains(layer, adapter) for layer, adapter, _ in _owned(optimizer) if Gains.concern(layer, adapter)
    ]
    if closure is None:
        _add_budget_gradients(optimizer)
        _each(gains, "enter")
        return None
    _each(gains, "enter")

    def with_budget(closure: Callable[[], Any] = closure) -> Any:
        """Re-evaluate the loss, then add the budget to the fresh gradients."""
        _each(gains, "leave")
        loss = closure()
        _add_budget_gradients(optimizer)
        _each(gains, "enter")
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": with_budget}
    return (args[0], with_budget, *args[2:]), kwargs


def _each(gains: list[Gains], what: str) -> None:
    for gain in gains:
        getattr(gain, what)()


@torch.no_grad()
def _add_budget_gradients(optimizer: Optimizer) -> None:
    scale = getattr(
        optimizer, "grad_scale", None
    )  # set by an AMP scaler for optimizers that unscale themselves
    for layer, adapter, _ in _owned(optimizer):
        config = layer.configs[adapter]
        if (
            config.stability_mode != "gradient"
            or config.stability_weight == 0
            or adapter not in layer.hiplora_delta
        ):
            continue
        delta = layer.hiplora_delta[adapter]
        if delta.grad is None:  # the module took no part in this step
            continue
        gradient = config.stability_weight * penalty_gradient(delta.float(), layer.budget(adapter))
        delta.grad.add_(gradient if scale is None else gradient * scale)


def _after_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    gains = _stepping.pop(optimizer, [])
    _each(gains, "scale_step")
    _each(gains, "leave")
    owned = list(_owned(optimizer))
    if not owned:
        return
    # A trainer may have switched on TF32 or autocast, which would leave a leak of a thousandth.
    with full_precision(owned[0][0].hiplora_A[owned[0][1]].device):
        for layer, adapter, rate in owned:
            _shrink_gains(layer, adapter, float(rate))
            layer.retract_(adapter)


def _shrink_gains(layer: HipLoraLinear, adapter: str, rate: float) -> None:
    """Take the proximal step of λ·R(δ) at the gains' learning rate, where that is the mode."""
    config = layer.configs[adapter]
    if (
        config.stability_mode != "proximal"
        or config.stability_weight == 0
        or adapter not in layer.hiplora_delta
    ):
        return
    delta = layer.hiplora_delta[adapter]
    if delta.grad is not None:
        step = rate * config.gain_lr_ratio * config.stability_weight
        # In ρ = δ/σ the weight of the budget is wσ², and shrinking ρ by a factor is shrinking δ by it.
        scale = layer.hiplora_sigma[adapter] ** 2 if config.relative_gains else 1.0
        delta.copy_(proximal_step(delta.float(), scale * layer.budget(adapter), step))
