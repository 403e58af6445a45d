"""Zero, Flip and Noise: one direction of one weight changed for a while (HiP-LoRA, appendix C.1.1)."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hiplora.errors import ConfigError
from hiplora.probing.directions import Direction
from hiplora.probing.modules import linear_weight

KINDS = ("zero", "flip", "noise")


@dataclass(frozen=True)
class Intervention:
    """What is done to a component `σ u vᵀ`: `W + c σ u vᵀ` with c = −1 (zero), −2 (flip) or ε ~ N(0, scale²) (noise).

    Raises:
        ConfigError: the kind is unknown, or the scale is not above 0 for noise, or not 0 for the others.
    """

    kind: str
    scale: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"intervention {self.kind!r}: expected one of {', '.join(KINDS)}")
        if self.kind == "noise" and not (self.scale > 0 and math.isfinite(self.scale)):
            raise ConfigError(f"noise of scale {self.scale}: expected a number > 0, as 0.1")
        if self.kind != "noise" and self.scale:
            raise ConfigError(f"{self.kind} takes no scale, got {self.scale}; leave it out")

    @classmethod
    def parse(cls, name: str) -> "Intervention":
        """Return the intervention of a name: `zero`, `flip`, `noise_0.1`.

        Raises:
            ConfigError: there is none of that name.
        """
        kind, _, scale = name.partition("_")
        try:
            return cls(kind, float(scale) if scale else 0.0)
        except ValueError as error:
            if isinstance(error, ConfigError) and kind in KINDS:
                raise
            raise ConfigError(
                f"intervention {name!r}: expected zero, flip, or noise_S as noise_0.1"
            ) from None

    @property
    def name(self) -> str:
        """Its name in tables, as the paper has it: `zero`, `flip`, `noise_0.1`."""
        return f"noise_{self.scale:g}" if self.kind == "noise" else self.kind

    def factor(self, normal: float) -> float:
        """Return c; `normal` is a draw of N(0, 1), which only noise makes use of."""
        return {"zero": -1.0, "flip": -2.0}.get(self.kind, self.scale * normal)


@contextlib.contextmanager
def intervened(model: nn.Module, direction: Direction, factor: float) -> Iterator[nn.Module]:
    """Have `W + factor · σ u vᵀ` in the place of a module's weight for a while; then the very same weight is back.

    The sum is made in fp32 and rounded to the weight's own precision. The changed weight is a parameter of its own: one
    that is tied to another leaves that alone. Works for `nn.Linear` and for GPT-2's `Conv1D`.

    Raises:
        ConfigError: the model has no such linear layer, or its weight has another shape.
    """
    module, weight = linear_weight(model, direction.module)
    left, right = direction.u, direction.v
    if isinstance(module, Conv1D):  # stored as (in, out)
        left, right = right, left
    if weight.shape != (len(left), len(right)):
        raise ConfigError(
            f"layer {direction.module}: the weight is {tuple(weight.shape)}, the direction is for "
            f"{(len(left), len(right))}; it is of another model"
        )
    with torch.no_grad():
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        changed = torch.addr(wide, left.to(wide), right.to(wide), alpha=factor * direction.sigma)
        replaced = nn.Parameter(changed.to(weight.dtype), requires_grad=False)
    module.weight = replaced
    try:
        yield model
    finally:
        module.weight = weight
