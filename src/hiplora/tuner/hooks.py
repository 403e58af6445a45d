"""Budget and retraction in any training loop, through torch's global optimizer hooks.

Just before a step the gradient of λ·R(δ) is added to the gains' gradients; just after it the gains are shrunk (proximal
mode), and A and B return to the complement. The gains belong to the optimizer that steps them itself: of one that hands
its steps to another (ZeroRedundancyOptimizer, SAM, Lookahead) only the outcome is retracted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from hiplora.errors import DivergedError
from hiplora.spectral import full_precision, penalty_gradient, proximal_step
from hiplora.tuner.buffers import is_sharded, own_part
from hiplora.tuner.layer import HipLoraLinear

_ITERATE = "z"  # under which schedule-free optimizers keep the second point that they average
_handles: list[Any] = []


def install() -> None:
    """Install the hooks; calling it again changes nothing."""
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(_before_step))
        _handles.append(register_optimizer_step_post_hook(_after_step))


class _Gains(NamedTuple):
    """The gains of one layer's adapter, their weights in the budget, and the optimizer's group that they are in."""

    layer: HipLoraLinear
    adapter: str
    parameter: Tensor
    weights: Tensor
    group: dict[str, Any]

    def pays(self, mode: str) -> bool:
        """Whether the gains take part in this step and pay for it in this mode."""
        config = self.layer.configs[self.adapter]
        return config.stability_mode == mode and config.stability_weight > 0 and self.parameter.grad is not None

    @property
    def price(self) -> float:
        """λ, negative where the optimizer ascends."""
        weight = self.layer.configs[self.adapter].stability_weight
        return -weight if self.group.get("maximize") else weight


class _Held(NamedTuple):
    """An adapter of a layer with parameters in an optimizer, by kind, and the group of each."""

    layer: HipLoraLinear
    adapter: str
    parameters: dict[str, Tensor]
    groups: dict[str, dict[str, Any]]


class _Step(NamedTuple):
    """What an optimizer holds as it begins a step: adapters, the gains that it steps itself, and those at a pace."""

    held: list[_Held]
    gains: list[_Gains]
    before: list[tuple[_Gains, Tensor]]


_stepping: weakref.WeakKeyDictionary[Optimizer, _Step] = weakref.WeakKeyDictionary()


def _held(optimizer: Optimizer) -> Iterator[_Held]:
    """Yield every adapter of a layer with parameters in the optimizer."""
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for layer in sorted(HipLoraLinear.live, key=lambda layer: layer.name):  # in one order in all processes
        for adapter in layer.hiplora_A:
            parameters = {kind: held.parameter(adapter) for kind, held in layer.held_by(adapter).items()}
            found = {kind: parameter for kind, parameter in parameters.items() if id(parameter) in groups}
            if found:
                yield _Held(layer, adapter, found, {kind: groups[id(one)] for kind, one in found.items()})


def _gains(held: list[_Held]) -> list[_Gains]:
    found = []
    for layer, adapter, parameters, groups in held:
        if (parameter := parameters.get("hiplora_delta")) is not None:
            weights = own_part(layer.budget(adapter), parameter)
            found.append(_Gains(layer, adapter, parameter, weights, groups["hiplora_delta"]))
    return found


def _delegates(optimizer: Optimizer) -> bool:
    """Whether the optimizer holds others, which then do its steps."""
    for value in vars(optimizer).values():
        inside: Iterable[Any] = value.values() if isinstance(value, dict) else value
        if not isinstance(value, (dict, list, tuple)):
            inside = (value,)
        if any(isinstance(one, Optimizer) for one in inside):
            return True
    return False


def _before_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    # torch passes the optimizer itself as the first positional argument.
    closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
    held = list(_held(optimizer))
    gains = [] if _delegates(optimizer) else _gains(held)
    for one in gains:
        one.layer.serve(one.adapter)
    paced = [one for one in gains if one.layer.configs[one.adapter].gain_lr_ratio != 1]
    _stepping[optimizer] = _Step(held, gains, [(one, one.parameter.detach().clone()) for one in paced])
    if closure is None:
        _add_budget_gradients(gains, optimizer)
        return None

    def with_budget(closure: Callable[[], Any] = closure) -> Any:
        """Re-evaluate the loss, then add the budget to it and to the fresh gradients."""
        loss = closure()
        _add_budget_gradients(gains, optimizer)
        return loss + _budget(gains) if isinstance(loss, (Tensor, float)) else loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": with_budget}
    return (args[0], with_budget, *args[2:]), kwargs


@torch.no_grad()
def _add_budget_gradients(gains: list[_Gains], optimizer: Optimizer) -> None:
    # An AMP scaler sets `grad_scale` on optimizers that unscale gradients themselves.
    scale = getattr(optimizer, "grad_scale", None)
    for one in gains:
        grad: Any = one.parameter.grad
        # Not twice to one gradient: a step that failed may be tried again.
        if one.pays("gradient") and getattr(grad, "hiplora_charged", None) != grad._version:
            gradient = one.price * penalty_gradient(one.parameter, one.weights)
            grad.add_(gradient if scale is None else gradient * scale)
            grad.hiplora_charged = grad._version


@torch.no_grad()
def _budget(gains: list[_Gains]) -> Tensor | float:
    """Return λ·ΣR(δ): a line search compares values of the loss whose gradient it is given."""
    terms = [one.price * one.layer.stability_penalty(one.adapter) for one in gains if one.pays("gradient")]
    return torch.stack([term.to(terms[0].device) for term in terms]).sum() if terms else 0.0


@torch.no_grad()
def _after_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    step: _Step = _stepping.pop(optimizer, _Step([], [], []))
    for one, before in step.before:
        ratio = one.layer.configs[one.adapter].gain_lr_ratio
        one.parameter.copy_(before + ratio * (one.parameter - before))
    # A fused optimizer goes through the motions of a step that an AMP scaler skips.
    skipped = getattr(optimizer, "found_inf", None)
    for one in step.gains:
        if one.pays("proximal") and not (skipped is not None and skipped.item()):
            _shrink(one)
    residual = [held for held in step.held if held.parameters.keys() - {"hiplora_delta"}]
    if residual:
        # A trainer may have switched on TF32 or autocast, which would leave a leak of a thousandth.
        with full_precision(next(iter(residual[0].parameters.values())).device):
            for held in residual:
                held.layer.retract_(held.adapter)
                _retract_iterates(held, optimizer)
    _check_finite(step.held)


def _shrink(gains: _Gains) -> None:
    """Take the proximal step of λ·R(δ) at the gains' learning rate."""
    config = gains.layer.configs[gains.adapter]
    step = float(gains.group.get("lr", 0.0)) * config.gain_lr_ratio * config.stability_weight
    gains.parameter.copy_(proximal_step(gains.parameter, gains.weights, step))


def _retract_iterates(held: _Held, optimizer: Optimizer) -> None:
    """Retract what a schedule-free optimizer averages with the parameters: the average then lies in the complement."""
    A, B = held.layer.hiplora_A.parameter(held.adapter), held.layer.hiplora_B.parameter(held.adapter)
    iterates = [optimizer.state.get(parameter, {}).get(_ITERATE) for parameter in (A, B)]
    if is_sharded(A) or not held.layer.configs[held.adapter].is_closed or all(one is None for one in iterates):
        return
    points = (parameter if one is None else one for parameter, one in zip((A, B), iterates, strict=True))
    for iterate, value in zip(iterates, held.layer.retracted(held.adapter, *points), strict=True):
        if iterate is not None:
            iterate.copy_(value)


def _check_finite(held: list[_Held]) -> None:
    """Stop at the step after which a parameter is not finite.

    Raises:
        DivergedError: names the layer and the parameter.
    """
    parameters = {
        f"layer {one.layer.name}: {kind} of adapter '{one.adapter}'": parameter
        for one in held
        for kind, parameter in one.parameters.items()
        if not is_sharded(parameter)
    }
    if torch.nn.utils.get_total_norm(parameters.values()).isfinite():
        return
    for name, parameter in parameters.items():
        if not parameter.isfinite().all():
            raise DivergedError(
                f"{name} has NaN or Inf after this optimizer step: the loss or its gradient was not finite; lower the "
                "learning rate, clip gradients, or look at the data of this step"
            )
