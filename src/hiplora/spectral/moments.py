"""What goes into a layer: the second moment of its inputs, summed up token by token, and its eigenvectors."""

import dataclasses
import math

import torch
from jaxtyping import Float
from torch import Tensor

from hiplora.errors import FactorError
from hiplora.spectral.precision import full_precision, widest

_CHUNK = 4096  # tokens that are held in float64 at a time
MAX_VECTORS = 2048  # eigenvectors kept of a wide input; the rest is only counted


class SecondMoment:
    """Running sum of `xxᵀ` over the inputs x (n,) of a layer, in float64 (fp32 on devices that have none)."""

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        device = torch.device(device)
        self.total = torch.zeros(width, width, dtype=widest(device), device=device)
        self.tokens = 0

    def add(self, inputs: Float[Tensor, "tokens n"]) -> None:
        """Add tokens; how they are split over calls changes the sum by rounding only."""
        with full_precision(self.total.device):
            for chunk in inputs.detach().split(_CHUNK):
                wide = chunk.to(self.total)
                self.total.addmm_(wide.T, wide)
        self.tokens += len(inputs)

    def eigen(self, name: str = "input") -> "InputBasis":
        """Return the eigenvectors of the mean `C = E[xxᵀ]`.

        Raises:
            FactorError: no token was seen, or a value was NaN or Inf.
        """
        if not self.tokens:
            raise FactorError(
                f"layer {name}: no token reached it while calibrating; use text that runs through it, or leave it out"
            )
        moment = self.total / self.tokens
        if not torch.isfinite(moment).all():
            raise FactorError(
                f"layer {name}: its inputs have NaN or Inf on the calibration text; calibrate in float32"
            )
        values, vectors = torch.linalg.eigh(moment)
        kept = vectors.flip(1)[:, :MAX_VECTORS].float().contiguous()
        return InputBasis(values.flip(0).clamp_min(0.0).cpu(), kept.cpu(), self.tokens)


@dataclasses.dataclass(frozen=True, eq=False)
class InputBasis:
    """Eigenvalues (n,) of a layer's input second moment, descending, and the leading eigenvectors (n, q), fp32."""

    values: Float[Tensor, " n"]
    vectors: Float[Tensor, "n q"]
    tokens: int

    @property
    def effective_rank(self) -> float:
        """Return exp of the entropy of the eigenvalues as shares of their sum; 1 to n, 0 for inputs all zero."""
        total = self.values.sum()
        if total == 0:
            return 0.0
        shares = self.values / total
        return math.exp(-torch.xlogy(shares, shares).sum().item())

    def energy(self, k: int) -> float:
        """Return the share of the inputs' energy `E‖x‖²` in the first k directions, in [0, 1]."""
        total = self.values.sum().item()
        return self.values[:k].sum().item() / total if total else 0.0

    def rank_for(self, energy: float) -> int:
        """Return the smallest k whose directions hold this share of the energy, at least 1."""
        total = self.values.sum()
        if total == 0:
            return 1
        reached = (self.values.cumsum(0) / total) >= energy - 1e-12
        return int(reached.int().argmax()) + 1 if reached.any() else len(self.values)
