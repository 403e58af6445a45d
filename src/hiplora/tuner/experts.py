"""Experts of transformers' mixture-of-experts models, whose 3-D parameters become linear layers, one an expert."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# An expert's projections as checkpoints and other libraries call them → the 3-D parameters that hold them.
ALIASES = {
    "gate_up_proj": ("gate_up_proj", "gate_proj", "up_proj", "w1", "w3"),
    "up_proj": ("up_proj", "w1"),
    "down_proj": ("down_proj", "w2"),
}


class ExpertList(nn.ModuleList):
    """One projection of all experts: a linear layer for each, in order."""


class UnrolledExperts(nn.Module):
    """An experts module of transformers as `ExpertList`s, views of its 3-D parameters; `fused` is the original."""

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        self.fused = fused
        for name in _projections(fused):
            weights: Any = fused._parameters.pop(name)
            weights = weights.data.mT if fused.is_transposed else weights.data
            setattr(self, name, ExpertList(_linear(weight) for weight in weights))

    def __getattr__(self, name: str) -> Any:
        """Find what this module lacks, such as `num_experts`, in the original."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("fused"), name)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts: (tokens, n) in, (tokens, n) out."""
        fused: Any = self.fused
        name, _ = _projections(fused)
        up = getattr(self, name)
        result = torch.zeros_like(hidden_states)
        # Processes that train together need the gradients of all experts, zeros for those without a token.
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        trains = distributed and torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        for expert in range(len(up)) if trains else top_k_index.unique().tolist():
            if expert >= len(up):  # where expert parallelism sends the tokens of other ranks
                continue
            token, choice = torch.where(top_k_index == expert)
            x = up[expert](hidden_states[token])
            if fused.has_bias:
                x = x + getattr(fused, f"{name}_bias")[expert]
            x = self.down_proj[expert](fused._apply_gate(x) if fused.has_gate else fused.act_fn(x))
            if fused.has_bias:
                x = x + fused.down_proj_bias[expert]
            if getattr(fused, "has_post_expert_norm", False):
                x = fused.post_expert_norm(x)
            result.index_add_(0, token, (x * top_k_weights[token, choice, None]).to(result.dtype))
        return result


def unroll(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Replace the experts modules of a model by unrolled ones; return their 3-D parameters, for `fuse`."""
    fused: dict[str, dict[str, nn.Parameter]] = {}
    for name, module in [(name, module) for name, module in model.named_modules() if can_unroll(module)]:
        fused[name] = {projection: getattr(module, projection) for projection in _projections(module)}
        model.set_submodule(name, UnrolledExperts(module))
    return fused


def fuse(model: nn.Module, fused: dict[str, dict[str, nn.Parameter]] | None = None) -> None:
    """Undo `unroll` where no adapter is left: with the very parameters that it returned, else with their copies."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, UnrolledExperts) or (fused is not None and name not in fused):
            continue
        lists: dict[str, Any] = {key: child for key, child in module.named_children() if isinstance(child, ExpertList)}
        if any(type(layer) is not nn.Linear for layers in lists.values() for layer in layers):
            continue  # still adapted
        for projection, layers in lists.items():
            parameter = (fused or {}).get(name, {}).get(projection)
            if parameter is None:
                weights = torch.stack([layer.weight.data for layer in layers])
                weights = weights.mT.contiguous() if module.is_transposed else weights
                parameter = nn.Parameter(weights, requires_grad=False)
            module.fused._parameters[projection] = parameter
        model.set_submodule(name, module.fused)


@contextlib.contextmanager
def unrolled(model: nn.Module) -> Iterator[None]:
    """Unroll the model's experts inside the block."""
    fused = unroll(model)
    try:
        yield
    finally:
        fuse(model, fused)


def can_unroll(module: nn.Module) -> bool:
    """Whether a module holds its experts as transformers' own interface for them expects."""
    interface = ("has_gate", "has_bias", "is_transposed", "_apply_gate")
    if isinstance(module, UnrolledExperts) or not all(hasattr(module, name) for name in interface):
        return False
    weights = [getattr(module, name, None) for name in _projections(module)]
    return all(isinstance(weight, nn.Parameter) and weight.dim() == 3 for weight in weights)


def shared_side(name: str) -> tuple[str, str] | None:
    """Return (list, side) of an expert's layer name: the side, "input" or "output", which all experts share.

    All experts read from, and write to, the hidden states; between their projections each has a space of its own.
    """
    parent, _, own = name.rpartition(".")
    if not own.isdigit() or parent.rpartition(".")[2] not in ALIASES:
        return None
    return parent, "output" if parent.endswith("down_proj") else "input"


def stacks(names: Iterable[str]) -> dict[str, tuple[str, list[str]]]:
    """Return layers as PEFT's LoRA has them: name → (prefix of its tensors' names, its layers in order).

    A linear layer stands for itself. Experts of a projection are one 3-D parameter; where both projections of a module
    are adapted, PEFT wraps the last one around the other.
    """
    stacked: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: (len(name), name)):  # expert 10 after expert 9
        side = shared_side(name)
        stacked.setdefault(side[0] if side else name, []).append(name)
    parameters = [name for name, layers in stacked.items() if layers != [name]]
    outer = {name.rpartition(".")[0]: name for name in sorted(parameters, key=lambda name: "down_proj" in name)}
    prefixes = {}
    for name in parameters:
        module = name.rpartition(".")[0]
        prefixes[name] = module if outer[module] == name else f"{module}.base_layer"
    return {name: (prefixes.get(name, name), layers) for name, layers in stacked.items()}


def _projections(module: Any) -> tuple[str, str]:
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


def _linear(weight: Tensor) -> nn.Linear:
    """Return a linear layer without bias over a weight (m, n), sharing its memory."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    # A registered parameter would lose its values where PEFT saves memory (`low_cpu_mem_usage`).
    layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    return layer
