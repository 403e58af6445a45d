"""Budget and retraction in any training loop, through torch's global optimizer hooks.

Just before a step the gradient of λ·R(δ) is added to the gains' gradients. Just after it the gains are shrunk (proximal
mode), A and B return to the complement, and the gradients are restored, also where the step fails. The gains belong to
the optimizer that steps them itself: where an optimizer hands its steps to another one (ZeroRedundancyOptimizer, SAM,
Lookahead), only its result is retracted.
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
from hiplora.spectral import penalty_gradient, proximal_step
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
class _SteppedAdapter:
    """An adapter of a layer with parameters in an optimizer, by kind, and the group that its gains are in."""

    layer: HipLoraLinear
    name: str
    parameters: dict[str, Tensor]
    group: dict[str, Any]
    weights: Any = None  # of the gains in the budget, where the optimizer steps them itself
    before: Tensor | None = None  # the gains before the step, where `gain_lr_ratio` is not 1
    charged: tuple[Tensor, int, Tensor | None] | None = None  # gradient with the budget, its version, its old value

    @property
    def config(self) -> HipLoraConfig:
        return self.layer.configs[self.name]

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
        """Whether the budget is in the gains' gradient, unchanged since."""
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
        """Restore the gains' gradient, where nobody has changed it since it was charged."""
        if self.charged is not None and self.charged[2] is not None and self._is_charged():
            self.gains.grad.copy_(self.charged[2])
            self.charged = None

    def leave_to(self, inner: _SteppedAdapter) -> None:
        """Leave the gains to an optimizer that this one has called; changes of a charged gradient stay."""
        if self.gains is inner.gains:
            self.discharge()
            if self.charged is not None and self.gains.grad is self.charged[0]:
                inner.charged = self.charged[0], self.charged[0]._version, None
            self.weights = self.before = self.charged = None


class _Arguments(tuple):
    """The arguments of a step. Only torch refers to them, so `__del__` runs at its end, also when it fails."""

    adapters: Sequence[_SteppedAdapter] = ()

    def __del__(self) -> None:
        for adapter in self.adapters:
            adapter.discharge()
            adapter.charged = None


_stepping: weakref.WeakKeyDictionary[Optimizer, list[_SteppedAdapter]] = weakref.WeakKeyDictionary()


def _stepped_adapters(optimizer: Optimizer) -> Iterator[_SteppedAdapter]:
    """Yield every adapter of a layer with parameters that the optimizer steps: a frozen one keeps every bit."""
    groups = {
        id(parameter): group
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad or parameter.grad is not None
    }
    for layer in sorted(HipLoraLinear.live, key=lambda layer: layer.name):  # in one order in all processes
        for name in layer.hiplora_A:
            parameters = {kind: by_name.parameter(name) for kind, by_name in layer.parameters_of(name).items()}
            stepped = {kind: parameter for kind, parameter in parameters.items() if id(parameter) in groups}
            if stepped:
                yield _SteppedAdapter(layer, name, stepped, groups.get(id(stepped.get("hiplora_delta")), {}))


def _inner_parameters(optimizer: Optimizer) -> dict[int, Tensor]:
    """Return the parameters of the optimizers inside an optimizer, which step them for it, by id."""
    parameters: dict[int, Tensor] = {}
    for value in vars(optimizer).values():
        values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
        for inner in values:
            if isinstance(inner, Optimizer):
                parameters |= {id(p): p for group in inner.param_groups for p in group["params"]}
    return parameters


def _before_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    # torch passes the optimizer itself as the first positional argument.
    closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
    outer_adapters = [adapter for adapters in _stepping.values() for adapter in adapters]
    adapters = list(_stepped_adapters(optimizer))
    Watch.steps_of_others += not adapters
    if not adapters:
        return None
    _stepping[optimizer] = adapters
    inner = _inner_parameters(optimizer)
    shared = any(id(parameter) in inner for group in optimizer.param_groups for parameter in group["params"])
    # ZeroRedundancyOptimizer leaves the rest to other processes.
    sharded = shared and dist.is_initialized() and dist.get_world_size() > 1
    holds_model = any(id(p) in inner for layer in HipLoraLinear.live if inner for p in layer.parameters())
    for adapter in adapters:
        gains = adapter.gains
        if gains is None or (not holds_model and any(p.dim() == 1 and len(p) >= len(gains) for p in inner.values())):
            continue  # the optimizers inside step copies
        adapter.layer.mark_hooked(adapter.name)
        for outer in outer_adapters:
            outer.leave_to(adapter)
        if not sharded and id(gains) not in inner:
            adapter.weights = own_part(adapter.layer.budget(adapter.name), gains)
            adapter.before = gains.detach().clone() if adapter.config.gain_lr_ratio != 1 else None
    if closure is None:
        _charge(adapters, optimizer)
    else:

        def with_budget() -> Any:
            """Re-evaluate the loss, then add the budget to it and to the fresh gradients."""
            loss = closure()
            _charge(adapters, optimizer)
            return loss + _budget(adapters) if isinstance(loss, (Tensor, float)) else loss

        if "closure" in kwargs:
            kwargs = {**kwargs, "closure": with_budget}
        else:
            args = (args[0], with_budget, *args[2:])
    arguments = _Arguments(args)
    arguments.adapters = adapters
    return arguments, kwargs


def _charge(adapters: list[_SteppedAdapter], optimizer: Optimizer) -> None:
    # An AMP scaler sets `grad_scale` on optimizers that unscale gradients themselves.
    for adapter in adapters:
        adapter.charge(getattr(optimizer, "grad_scale", None))


@torch.no_grad()
def _budget(adapters: list[_SteppedAdapter]) -> Tensor | float:
    """Return λ·ΣR(δ): a line search compares values of the loss whose gradient it is given."""
    paying = [adapter for adapter in adapters if adapter.pays("gradient")]
    terms = [adapter.price * adapter.layer.stability_penalty(adapter.name) for adapter in paying]
    return torch.stack([term.to(terms[0].device) for term in terms]).sum() if terms else 0.0


@torch.no_grad()
def _after_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    adapters = _stepping.pop(optimizer, [])
    # A fused optimizer goes through the motions of a step that an AMP scaler skips.
    found_inf = getattr(optimizer, "found_inf", None)
    for adapter in adapters:
        adapter.discharge()
        ratio = adapter.config.gain_lr_ratio
        if adapter.before is not None:
            adapter.gains.copy_(adapter.before + ratio * (adapter.gains - adapter.before))
        if adapter.pays("proximal") and not (found_inf is not None and found_inf.item()):
            step = float(adapter.group.get("lr", 0.0)) * ratio * adapter.config.stability_weight
            adapter.gains.copy_(proximal_step(adapter.gains, adapter.weights, step))
        if adapter.parameters.keys() - {"hiplora_delta"}:
            adapter.layer.retract_(adapter.name)
            _retract_iterates(adapter, optimizer)
    _check_finite(adapters)


def _retract_iterates(adapter: _SteppedAdapter, optimizer: Optimizer) -> None:
    """Retract the iterates that a schedule-free optimizer averages: the average then lies in the complement."""
    layer, name = adapter.layer, adapter.name
    A, B = layer.hiplora_A.parameter(name), layer.hiplora_B.parameter(name)
    iterates = [optimizer.state.get(parameter, {}).get(_ITERATE) for parameter in (A, B)]
    if is_sharded(A) or not adapter.config.is_closed or all(iterate is None for iterate in iterates):
        return
    points = (p if iterate is None else iterate for p, iterate in zip((A, B), iterates, strict=True))
    for iterate, value in zip(iterates, layer.retracted(name, *points), strict=True):
        if iterate is not None:
            iterate.copy_(value)


def _check_finite(adapters: list[_SteppedAdapter]) -> None:
    """Raise DivergedError, naming the parameter, if one is not finite after this step."""
    parameters = {
        f"layer {adapter.layer.name}: {kind} of adapter '{adapter.name}'": parameter
        for adapter in adapters
        for kind, parameter in adapter.parameters.items()
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
