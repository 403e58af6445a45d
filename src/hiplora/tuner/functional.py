"""The forward and backward pass of the two channels on a frozen linear layer, fused.

`y = base_out + [s·B | U diag(δ)] ([A; Vᵀ] x)`: both channels go through one pair of thin products of width r + k.
The hand-written backward keeps only the layer's input and the thin activation (with dropout, also one byte an element).
Tracing, torch.func and second derivatives get both channels in torch's own operations.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hiplora.spectral import protected, retract

_DRAWS = 1 << 16


def add_channels(
    base_out: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    delta: Tensor | None,
    U: Tensor | None,
    V: Tensor | None,
    scaling: float,
    dropout: float,
    sides: str | None = None,
    project_gradients: bool = True,
) -> Tensor:
    """Return `base_out` (..., m) plus both channels' output for inputs x (..., n) (Eq. 1, 2 and 5 on activations).

    A (r, n) and B (m, r), whose dtype is computed in (autocast's, inside autocast), are scaled by α/r; gains δ (k,), or
    None, act between U (m, k) and V (n, k). `dropout` is that of the residual channel's input. A and B act through the
    projection of Eq. 4 on `sides` (None: as they are), and so do their gradients with `project_gradients` (Eq. 5).
    """
    device = x.device.type
    if observed():
        inputs = x.to(A.dtype)
        dropped = F.dropout(inputs, dropout)
        update = _update(inputs, dropped, A, B, delta, U, V, scaling, sides, project_gradients)
        return (base_out + update).to(base_out.dtype)
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else A.dtype
    with _no_autocast(device):
        return _AddChannels.apply(
            base_out, x, A, B, delta, U, V, scaling, dropout, compute, sides, sides is not None and project_gradients
        )


def observed() -> bool:
    """Whether torch.compile, torch.export, torch.jit.trace or torch.func looks at each operation of a pass."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return bool(torch._C._are_functorch_transforms_active())  # type: ignore[attr-defined]  # has no public name


def _update(
    inputs: Tensor,
    dropped: Tensor,
    A: Tensor,
    B: Tensor,
    delta: Tensor | None,
    U: Tensor | None,
    V: Tensor | None,
    scaling: float,
    sides: str | None,
    project_gradients: bool,
) -> Tensor:
    """Return both channels' output in differentiable operations, to be fused, traced or differentiated again."""
    dtype = inputs.dtype
    if sides is not None:
        with torch.autocast(inputs.device.type, enabled=False):
            projected_A, projected_B = retracted(A, B, U, V, sides)
            A = projected_A if project_gradients else A + (projected_A - A).detach()
            B = projected_B if project_gradients else B + (projected_B - B).detach()
    update = F.linear(F.linear(dropped, A.to(dtype)), B.to(dtype)) * scaling
    if delta is not None and U is not None and V is not None:
        update = update + F.linear((inputs @ V.to(dtype)) * delta.to(dtype), U.to(dtype))
    return update


def _no_autocast(device: str) -> Any:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def retracted(A: Tensor, B: Tensor, U: Any, V: Any, sides: str) -> tuple[Tensor, Tensor]:
    """Return A and B, or their gradients, in the complement (Eq. 4), fp32 at least."""
    dtype = torch.promote_types(A.dtype, torch.float32)
    return retract(A.to(dtype), B.to(dtype), *(basis.to(dtype) for basis in protected(U, V, sides)))


def keep_mask(shape: torch.Size, dropout: float, device: torch.device) -> tuple[Tensor, float]:
    """Return a boolean mask of kept elements and the exact probability of keeping one.

    On the CPU four elements share one 64-bit draw, which is several times quicker than torch's `bernoulli_`: the
    probability is rounded to 1/65536.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(1 - dropout), 1 - dropout
    dropped = min(round(dropout * _DRAWS), _DRAWS - 1)
    draws = torch.empty((shape.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    lanes = draws.view(torch.int16)[: shape.numel()].view(shape)
    return lanes >= dropped - _DRAWS // 2, 1 - dropped / _DRAWS


class _AddChannels(torch.autograd.Function):
    """Custom pass of `add_channels`; U, V and the arguments after them are constants."""

    @staticmethod
    def forward(
        ctx: Any,
        base_out: Tensor,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        delta: Tensor | None,
        U: Tensor | None,
        V: Tensor | None,
        scaling: float,
        dropout: float,
        compute: torch.dtype,
        sides: str | None,
        project_gradients: bool,
    ) -> Tensor:
        r, ctx.dtype = A.shape[0], A.dtype
        ctx.unprojected, ctx.projection = (A, B), (sides, project_gradients)
        if sides is not None:
            A, B = retracted(A, B, U, V, sides)
        inputs = x.reshape(-1, x.shape[-1]).to(compute)
        down = _down(A, None if delta is None else V, compute)
        mask, keep = None, 1.0
        if dropout > 0:
            mask, keep = keep_mask(inputs.shape, dropout, x.device)
            residual = (inputs * mask) @ down[:r].T
            thin = residual if delta is None else torch.cat([residual, inputs @ down[r:].T], dim=1)
        else:
            thin = inputs @ down.T
        up = _up(B, None if delta is None else U, delta, scaling / keep, compute)
        flat = base_out.reshape(-1, base_out.shape[-1])
        y = torch.addmm(flat.to(compute), thin, up.T).to(base_out.dtype)
        ctx.save_for_backward(x, A, B, delta, U, V, thin, mask)
        ctx.scaling, ctx.compute = scaling / keep, compute
        ctx.sides = sides if project_gradients else None
        return torch.ops.aten._unsafe_view(y, base_out.shape)  # no view: a model may change it in place

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _gradients_to_differentiate if torch.is_grad_enabled() else _gradients
        with _no_autocast(grad_out.device.type):
            return grad_out, *gradients(ctx, grad_out), *[None] * 7


def _gradients_to_differentiate(ctx: Any, grad_out: Tensor) -> list[Tensor | None]:
    """Return the gradients of x, A, B and δ with a graph of their own (`create_graph=True`)."""
    x, _, _, delta, U, V, _, mask = ctx.saved_tensors
    # Views: a layer that is called twice is behind its own input.
    views: list[Any] = [None if t is None else t.view_as(t) for t in (x, *ctx.unprojected, delta)]
    x, A, B, delta = views
    inputs = x.to(ctx.compute)
    dropped = inputs if mask is None else inputs * mask.view(x.shape)
    update = _update(inputs, dropped, A, B, delta, U, V, ctx.scaling, *ctx.projection)
    needed = [view for view, needs in zip(views, ctx.needs_input_grad[1:5], strict=True) if needs]
    gradients = iter(torch.autograd.grad(update, needed, grad_out.to(update.dtype), create_graph=True))
    return [next(gradients) if needs else None for needs in ctx.needs_input_grad[1:5]]


def _gradients(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, A, B and δ; None for each that is not needed."""
    x, A, B, delta, U, V, thin, mask = ctx.saved_tensors
    r, compute = A.shape[0], ctx.compute
    _, need_x, need_A, need_B, need_delta = ctx.needs_input_grad[:5]
    g = grad_out.reshape(-1, grad_out.shape[-1]).to(compute)
    up = _up(B, None if delta is None else U, None, ctx.scaling, compute)
    back = g @ up  # g [s·B | U], (N, r + k)
    residual = back.narrow(1, 0, r)  # torch cannot batch back[:, :r] where it is all of it (is_grads_batched)
    dx = d_A = d_B = d_delta = None
    if need_A:
        inputs = x.reshape(-1, x.shape[-1]).to(compute)
        d_A = (residual.T @ (inputs if mask is None else inputs * mask)).to(ctx.dtype)
    if need_B:
        d_B = (g.T @ thin[:, :r]).mul_(ctx.scaling).to(ctx.dtype)
    if ctx.sides is not None:
        # Before clipping and the optimizer's moments: the gradients of s (I − P_U) BA (I − P_V), not of sBA.
        projected_A, projected_B = retracted(A if d_A is None else d_A, B if d_B is None else d_B, U, V, ctx.sides)
        d_A = None if d_A is None else projected_A.to(ctx.dtype)
        d_B = None if d_B is None else projected_B.to(ctx.dtype)
    if need_delta and delta is not None:
        d_delta = torch.linalg.vecdot(back[:, r:], thin[:, r:], dim=0).to(delta.dtype)
    if need_x:
        if delta is not None:
            back[:, r:].mul_(delta)
        down = _down(A, None if delta is None else V, compute)
        # The mask is the residual channel's alone.
        dx = back @ down if mask is None else (residual @ down[:r]).mul_(mask).addmm_(back[:, r:], down[r:])
        dx = dx.view(x.shape).to(x.dtype)
    return dx, d_A, d_B, d_delta


def _down(A: Tensor, V: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return `[A; Vᵀ]`, (r + k, n)."""
    return A.to(dtype) if V is None else torch.cat([A.to(dtype), V.T.to(dtype)])


def _up(B: Tensor, U: Tensor | None, delta: Tensor | None, scaling: float, dtype: torch.dtype) -> Tensor:
    """Return `[s·B | U diag(δ)]`, (m, r + k), or `[s·B | U]` if `delta` is None."""
    residual = B.to(dtype) * scaling
    if U is None:
        return residual
    principal = U.to(dtype)
    return torch.cat([residual, principal if delta is None else principal * delta.to(dtype)], dim=1)
