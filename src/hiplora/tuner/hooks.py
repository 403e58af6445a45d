"""Budget and retraction in any training loop, through torch's global optimizer hooks.

Just before a step the gradient of λ·R(δ) is added to the gains' gradients; just after it the gains are shrunk (proximal
mode), A and B return to the complement, and the gradients are what they were, as after a step that fails. The gains
belong to the optimizer that steps them itself: of one that hands its steps to another (ZeroRedundancyOptimizer, SAM,
Lookahead) only the outcome is retracted.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from hiplora.errors import DivergedError
from hiplora.spectral import full_precision, penalty_gradient, proximal_step
from hiplora.tuner.config import HipLoraConfig
from hiplora.tuner.layer import HipLoraLinear
from hiplora.tuner.state import Watch, is_sharded, own_part

_ITERATE = "z"  # under which schedule-free optimizers keep the second point that they average
_handles: list[Any] = []


def install() -> None:
    """Install the hooks; calling it again changes nothing."""
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(_before_step))
        _handles.append(register_optimizer_step_post_hook(_after_step))


@dataclass
class _Held:
    """An adapter of a layer with parameters in an optimizer, by kind, and the group that its gains are in."""

    layer: HipLoraLinear
    adapter: str
    parameters: dict[str, Tensor]
    group: dict[str, Any]
    weights: Any = None  # of the gains in the budget, where the optimizer steps them itself
    before: Tensor | None = None  # the gains before the step, where they go at a pace of their own
    charged: tuple[Tensor, int, Tensor | None] | None = None  # a gradient with the budget, its version, what it was

    @property
    def config(self) -> HipLoraConfig:
        return self.layer.configs[self.adapter]

    @property
    def gains(self) -> Any:
        return self.parameters.get("hiplora_delta")

    def pays(self, mode: str) -> bool:
        """Whether the gains take part in this step and pay for it in this mode."""
        priced = self.config.stability_mode == mode and self.config.stability_weight > 0
        return priced and self.weights is not None and self.gains.grad is not None

    @property
    def price(self) -> float:
        """λ, negative where the optimizer ascends."""
        weight = self.config.stability_weight
        return -weight if self.group.get("maximize") else weight

    def _is_charged(self) -> bool:
        """Whether the budget is in the gains' gradient, and nobody has changed that since."""
        return (
            self.charged is not None
            and self.gains.grad is self.charged[0]
            and self.charged[1] == self.charged[0]._version
        )

    @torch.no_grad()
    def charge(self, scale: Tensor | None) -> None:
        """Add the budget to the gains' gradient, once to each."""
        if self.pays("gradient") and not self._is_charged():
            grad, gradient = self.gains.grad, self.price * penalty_gradient(self.gains, self.weights)
            before = grad.clone()
            grad.add_(gradient if scale is None else gradient * scale)
            self.charged = grad, grad._version, before

    @torch.no_grad()
    def discharge(self) -> None:
        """Put the gains' gradient back as it was, where nobody has changed it since it was charged."""
        if self.charged is not None and self.charged[2] is not None and self._is_charged():
            self.gains.grad.copy_(self.charged[2])
            self.charged = None

    def leave_to(self, inner: _Held) -> None:
        """Leave the gains to an optimizer that this one has called; what it has done to a charged gradient stays."""
        if self.gains is inner.gains:
            self.discharge()
            if self.charged is not None and self.gains.grad is self.charged[0]:
                inner.charged = self.charged[0], self.charged[0]._version, None
            self.weights = self.before = self.charged = None


class _Arguments(tuple):
    """The arguments of a step, held by torch alone: they go when the step has ended, and if it failed only they do."""

    held: Sequence[_Held] = ()

    def __del__(self) -> None:
        for one in self.held:
            one.discharge()
            one.charged = None


_stepping: weakref.WeakKeyDictionary[Optimizer, list[_Held]] = weakref.WeakKeyDictionary()


def _held(optimizer: Optimizer) -> Iterator[_Held]:
    """Yield every adapter of a layer with parameters in the optimizer."""
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for layer in sorted(HipLoraLinear.live, key=lambda layer: layer.name):  # in one order in all processes
        for adapter in layer.hiplora_A:
            parameters = {kind: held.parameter(adapter) for kind, held in layer.held_by(adapter).items()}
            found = {kind: parameter for kind, parameter in parameters.items() if id(parameter) in groups}
            if found:
                yield _Held(layer, adapter, found, groups.get(id(found.get("hiplora_delta")), {}))


def _inside(optimizer: Optimizer) -> dict[int, Tensor]:
    """Return the parameters of the optimizers that an optimizer holds, which step them for it."""
    found: dict[int, Tensor] = {}
    for value in vars(optimizer).values():
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
        for one in inside:
            if isinstance(one, Optimizer):
                found |= {id(parameter): parameter for group in one.param_groups for parameter in group["params"]}
    return found


def _before_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    # torch passes the optimizer itself as the first positional argument.
    closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
    held, running = list(_held(optimizer)), [one for held in _stepping.values() for one in held]
    Watch.steps_of_others += not held
    if not held:
        return None
    _stepping[optimizer] = held
    inside = _inside(optimizer)
    shared = any(id(parameter) in inside for group in optimizer.param_groups for parameter in group["params"])
    # ZeroRedundancyOptimizer leaves the rest to other processes.
    elsewhere = shared and dist.is_initialized() and dist.get_world_size() > 1
    known = any(id(p) in inside for layer in HipLoraLinear.live if inside for p in layer.parameters())
    for one in held:
        if one.gains is None or (
            not known and any(p.dim() == 1 and len(p) >= len(one.gains) for p in inside.values())
        ):
            continue  # the optimizers inside hold copies
        one.layer.serve(one.adapter)
        for outer in running:
            outer.leave_to(one)
        if not elsewhere and id(one.gains) not in inside:
            one.weights = own_part(one.layer.budget(one.adapter), one.gains)
            one.before = one.gains.detach().clone() if one.config.gain_lr_ratio != 1 else None
    if closure is None:
        _charge(held, optimizer)
    else:

        def with_budget() -> Any:
            """Re-evaluate the loss, then add the budget to it and to the fresh gradients."""
            loss = closure()
            _charge(held, optimizer)
            return loss + _budget(held) if isinstance(loss, (Tensor, float)) else loss

        if "closure" in kwargs:
            kwargs = {**kwargs, "closure": with_budget}
        else:
            args = (args[0], with_budget, *args[2:])
    arguments = _Arguments(args)
    arguments.held = held
    return arguments, kwargs


def _charge(held: list[_Held], optimizer: Optimizer) -> None:
    # An AMP scaler sets `grad_scale` on optimizers that unscale gradients themselves.
    for one in held:
        one.charge(getattr(optimizer, "grad_scale", None))


@torch.no_grad()
def _budget(held: list[_Held]) -> Tensor | float:
    """Return λ·ΣR(δ): a line search compares values of the loss whose gradient it is given."""
    terms = [one.price * one.layer.stability_penalty(one.adapter) for one in held if one.pays("gradient")]
    return torch.stack([term.to(terms[0].device) for term in terms]).sum() if terms else 0.0


@torch.no_grad()
def _after_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    held = _stepping.pop(optimizer, [])
    # A fused optimizer goes through the motions of a step that an AMP scaler skips.
    found_inf = getattr(optimizer, "found_inf", None)
    for one in held:
        one.discharge()
        ratio = one.config.gain_lr_ratio
        if one.before is not None:
            one.gains.copy_(one.before + ratio * (one.gains - one.before))
        if one.pays("proximal") and not (found_inf is not None and found_inf.item()):
            step = float(one.group.get("lr", 0.0)) * ratio * one.config.stability_weight
            one.gains.copy_(proximal_step(one.gains, one.weights, step))
    residual = [one for one in held if one.parameters.keys() - {"hiplora_delta"}]
    if residual:
        # A trainer may have switched on TF32 or autocast, which would leave a leak of a thousandth.
        with full_precision(next(iter(residual[0].parameters.values())).device):
            for one in residual:
                one.layer.retract_(one.adapter)
                _retract_iterates(one, optimizer)
    _check_finite(held)


def _retract_iterates(held: _Held, optimizer: Optimizer) -> None:
    """Retract what a schedule-free optimizer averages with the parameters: the average then lies in the complement."""
    A, B = held.layer.hiplora_A.parameter(held.adapter), held.layer.hiplora_B.parameter(held.adapter)
    iterates = [optimizer.state.get(parameter, {}).get(_ITERATE) for parameter in (A, B)]
    if is_sharded(A) or not held.config.is_closed or all(one is None for one in iterates):
        return
    points = (parameter if one is None else one for parameter, one in zip((A, B), iterates, strict=True))
    for iterate, value in zip(iterates, held.layer.retracted(held.adapter, *points), strict=True):
        if iterate is not None:
            iterate.copy_(value)


def _check_finite(held: list[_Held]) -> None:
    """Stop at the step after which a parameter is not finite: a DivergedError that names it."""
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
