"""Gains with a learning rate of their own, or stepped in relative units: a change of variable around a step."""

from __future__ import annotations

import torch
from torch import Tensor

from hiplora.tuner.layer import HipLoraLinear


class Gains:
    """The gains of one layer while an optimizer steps: it sees ρ = δ/σ where they are relative, else δ itself.

    Whatever the optimizer, the outcome is what it would be for a model whose parameter is ρ, at `gain_lr_ratio` times
    the learning rate (a step is linear in the rate, weight decay included). δ_i with σ_i = 0 stays in its own units.
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
        self._entered = False

    @staticmethod
    def concern(layer: HipLoraLinear, adapter: str) -> bool:
        """Whether an adapter's gains are stepped otherwise than its other parameters."""
        config = layer.configs[adapter]
        return adapter in layer.hiplora_delta and (config.gain_lr_ratio != 1 or config.relative_gains)

    @torch.no_grad()
    def enter(self) -> None:
        """Show the optimizer ρ and its gradient."""
        if self.scale is not None:
            self.delta.copy_(self.delta.float() / self.scale)
            if self.delta.grad is not None:
                self.delta.grad.mul_(self.scale)
            self._entered = True
        if self.before is None:
            self.before = self.delta.detach().float().clone()

    @torch.no_grad()
    def leave(self) -> None:
        """Make it δ again."""
        if self.scale is not None and self._entered:
            self.delta.copy_(self.delta.float() * self.scale)
            if self.delta.grad is not None:
                self.delta.grad.div_(self.scale)
            self._entered = False

    @torch.no_grad()
    def scale_step(self) -> None:
        """Make the step that was taken that of the gains' own learning rate."""
        if self.before is not None and self.ratio != 1:
            self.delta.copy_(self.before + self.ratio * (self.delta.float() - self.before))
