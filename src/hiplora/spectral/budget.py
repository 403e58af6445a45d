"""The stability budget on the gains: weights, penalty, gradient and proximal step (Eq. 6, 7, 9)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from hiplora.errors import ConfigError


def budget_weights(sigma: Float[Tensor, " k"], gamma: float) -> Float[Tensor, " k"]:
    """Return `w_i = σ_i^γ / Σ_j σ_j^γ` (Eq. 6); they sum to one.

    `γ = 0` and an all-zero spectrum give the uniform `1/k`. Singular values are divided by the largest
    first, so that no γ overflows.

    Raises:
        ConfigError: `gamma` is negative (small directions would be protected without bound) or not finite.
    """
    if not math.isfinite(gamma) or gamma < 0:
        raise ConfigError(f"stability_gamma {gamma}: expected a finite number >= 0 (0: all alike)")
    top = sigma.max() if sigma.numel() else sigma.sum()
    if gamma == 0 or top <= 0:
        return torch.full_like(sigma, 1 / max(sigma.numel(), 1))
    powers = (sigma.double() / top.double()).clamp_min(0) ** gamma
    return (powers / powers.sum()).to(sigma.dtype)


def penalty(delta: Float[Tensor, " k"], weights: Float[Tensor, " k"]) -> Float[Tensor, ""]:
    """Return `R(δ) = Σ_i w_i δ_i²` (Eq. 9) as a differentiable scalar, without λ."""
    return (weights * delta * delta).sum()


def penalty_gradient(delta: Float[Tensor, " k"], weights: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """Return `∂R/∂δ = 2wδ`, the budget's share of the gradient of Eq. 7 without λ."""
    return 2 * weights * delta


def proximal_step(delta: Float[Tensor, " k"], weights: Float[Tensor, " k"], step: float) -> Float[Tensor, " k"]:
    """Return `argmin_x ½‖x − δ‖² + step·R(x) = δ / (1 + 2·step·w)`: the budget applied after a step.

    `step` is the learning rate times λ. No step size makes it diverge or change a sign.

    Raises:
        ConfigError: `step` is negative or not finite.
    """
    if not math.isfinite(step) or step < 0:
        raise ConfigError(f"proximal step {step}: expected a finite number >= 0")
    return delta / (1 + 2 * step * weights)
