"""Budget and retraction in any training loop, through torch's global optimizer hooks.

Just before a step the gradient of λ·R(δ) is added to the gains' gradients; just after it the gains are shrunk (proximal
mode) and the residual factors return to the complement. Gains with a learning rate or a scale of their own change their
variable for the time of the step. Optimizers without HiP-LoRA parameters are left alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from hiplora.spectral import full_precision, penalty_gradient, proximal_step
from hiplora.tuner.layer import HipLoraLinear

_layers: weakref.WeakSet[HipLoraLinear] = weakref.WeakSet()
_handles: list[Any] = []
_stepping: weakref.WeakKeyDictionary[Optimizer, list[_OwnUnits]] = weakref.WeakKeyDictionary()


def watch(layer: HipLoraLinear) -> None:
    """Let the hooks serve this layer; installs them on first use."""
    _layers.add(layer)
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(_before_step))
        _handles.append(register_optimizer_step_post_hook(_after_step))


class _OwnUnits:
    """The gains of one layer while an optimizer steps: it sees ρ = δ/σ where they are relative, else δ itself.

    The outcome is that of any optimizer on a model whose parameter is ρ, at `gain_lr_ratio` times the learning rate (a
    step is linear in the rate, weight decay included). δ_i with σ_i = 0 stays in its own units.
    """

    def __init__(self, layer: HipLoraLinear, adapter: str):
        config = layer.configs[adapter]
        self.delta: Tensor = layer.hiplora_delta[adapter]
        self.ratio = config.gain_lr_ratio
        self.scale: Tensor | None = None
        if config.relative_gains:
            layer.ensure_factors(adapter)
            sigma = layer.hiplora_sigma[adapter]
            self.scale = torch.where(sigma > 0, sigma, torch.ones_like(sigma))
        self.before: Tensor | None = None

    @torch.no_grad()
    def enter(self) -> None:
        """Show the optimizer ρ and its gradient."""
        if self.scale is not None:
            self.delta.copy_(self.delta.float() / self.scale)
            if self.delta.grad is not None:
                self.delta.grad.mul_(self.scale)
        if self.before is None:
            self.before = self.delta.detach().float().clone()

    @torch.no_grad()
    def leave(self) -> None:
        """Turn it back into δ."""
        if self.scale is not None:
            self.delta.copy_(self.delta.float() * self.scale)
            if self.delta.grad is not None:
                self.delta.grad.div_(self.scale)

    @torch.no_grad()
    def scale_step(self) -> None:
        """Scale the step just taken to the gains' own learning rate."""
        if self.before is not None and self.ratio != 1:
            self.delta.copy_(self.before + self.ratio * (self.delta.float() - self.before))


def _owned(optimizer: Optimizer) -> Iterator[tuple[HipLoraLinear, str, float]]:
    """Yield (layer, adapter, learning rate) for every adapter that has a trainable parameter in `optimizer`."""
    rates = {id(p): group.get("lr", 0.0) for group in optimizer.param_groups for p in group["params"]}
    for layer in _layers:
        for adapter in layer.hiplora_A:
            kinds = (layer.hiplora_delta, layer.hiplora_A, layer.hiplora_B)
            parameters = [held[adapter] for held in kinds if adapter in held and held[adapter].requires_grad]
            if found := [rates[id(p)] for p in parameters if id(p) in rates]:
                yield layer, adapter, float(found[0])


def _budgeted(layer: HipLoraLinear, adapter: str, mode: str) -> bool:
    """Whether the gains took part in this step and the hooks apply the budget in this mode."""
    config = layer.configs[adapter]
    return (
        config.stability_mode == mode
        and config.stability_weight > 0
        and adapter in layer.hiplora_delta
        and layer.hiplora_delta[adapter].grad is not None
    )


def _before_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    # torch passes the optimizer itself as the first positional argument.
    closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
    gains = _stepping[optimizer] = [
        _OwnUnits(layer, adapter)
        for layer, adapter, _ in _owned(optimizer)
        if adapter in layer.hiplora_delta
        and (layer.configs[adapter].gain_lr_ratio != 1 or layer.configs[adapter].relative_gains)
    ]
    if closure is None:
        _add_budget_gradients(optimizer)
    for gain in gains:
        gain.enter()
    if closure is None:
        return None

    def with_budget(closure: Callable[[], Any] = closure) -> Any:
        """Re-evaluate the loss, then add the budget to the fresh gradients."""
        for gain in gains:
            gain.leave()
        loss = closure()
        _add_budget_gradients(optimizer)
        for gain in gains:
            gain.enter()
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": with_budget}
    return (args[0], with_budget, *args[2:]), kwargs


@torch.no_grad()
def _add_budget_gradients(optimizer: Optimizer) -> None:
    # An AMP scaler sets `grad_scale` on optimizers that unscale gradients themselves.
    scale = getattr(optimizer, "grad_scale", None)
    for layer, adapter, _ in _owned(optimizer):
        if _budgeted(layer, adapter, "gradient"):
            delta = layer.hiplora_delta[adapter]
            weight = layer.configs[adapter].stability_weight
            gradient = weight * penalty_gradient(delta.float(), layer.budget(adapter))
            delta.grad.add_(gradient if scale is None else gradient * scale)


def _after_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    for gain in _stepping.pop(optimizer, []):
        gain.scale_step()
        gain.leave()
    owned = list(_owned(optimizer))
    if not owned:
        return
    # A trainer may have switched on TF32 or autocast, which would leave a leak of a thousandth.
    with full_precision(owned[0][0].hiplora_A[owned[0][1]].device):
        for layer, adapter, rate in owned:
            if _budgeted(layer, adapter, "proximal"):
                _shrink_gains(layer, adapter, rate)
            layer.retract_(adapter)


def _shrink_gains(layer: HipLoraLinear, adapter: str, rate: float) -> None:
    """Take the proximal step of λ·R(δ) at the gains' learning rate."""
    config, delta = layer.configs[adapter], layer.hiplora_delta[adapter]
    step = rate * config.gain_lr_ratio * config.stability_weight
    # In ρ = δ/σ the weight of the budget is wσ², and shrinking ρ by a factor is shrinking δ by it.
    scale = layer.hiplora_sigma[adapter] ** 2 if config.relative_gains else 1.0
    delta.copy_(proximal_step(delta.float(), scale * layer.budget(adapter), step))
