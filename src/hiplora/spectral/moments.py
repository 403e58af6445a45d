"""Second moments of what goes into a layer, or of the gradients at what comes out of it, and their eigenvectors."""

import dataclasses
import math

import numpy
import scipy.linalg
import torch
from jaxtyping import Float
from torch import Tensor

from hiplora.errors import FactorError
from hiplora.spectral.precision import full_precision, widest
from hiplora.spectral.rank import rank_for_energy

_CHUNK = 4096  # tokens that are held in float64 at a time
MAX_VECTORS = 2048  # eigenvectors kept of a wide input; the rest is only counted


class SecondMoment:
    """Running sum of `xxᵀ` over vectors x (n,), one a token, in float64 (fp32 on devices that have none)."""

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        device = torch.device(device)
        self._sum = torch.zeros(width, width, dtype=widest(device), device=device)
        self._half = device.type == "cpu"  # only the lower triangle is summed up: half the work
        self.tokens = 0

    @property
    def total(self) -> Float[Tensor, "n n"]:
        """Return the sum, symmetric."""
        return self._sum.tril() + self._sum.tril(-1).T if self._half else self._sum

    def add(self, inputs: Float[Tensor, "tokens n"]) -> None:
        """Add tokens; how they are split over calls changes the sum by rounding only."""
        with full_precision(self._sum.device):
            for chunk in inputs.detach().split(_CHUNK):
                wide = chunk.to(self._sum)
                if not len(wide):
                    continue
                if self._half:
                    self._add_half(wide.contiguous().numpy())
                else:
                    self._sum.addmm_(wide.T, wide)
        self.tokens += len(inputs)

    def _add_half(self, wide: numpy.ndarray) -> None:
        """BLAS' symmetric update, in place; what it calls the upper triangle, by columns, is our lower one."""
        held = self._sum.numpy().T
        result = scipy.linalg.blas.dsyrk(1.0, wide.T, beta=1.0, c=held, overwrite_c=1)
        if not numpy.shares_memory(result, held):
            held[...] = result

    def eigen(self, name: str = "input") -> "MomentBasis":
        """Return the eigenvectors of the mean `C = E[xxᵀ]`.

        Raises:
            FactorError: no token was seen, or a value was NaN or Inf.
        """
        mean = self._mean(name, "inputs")
        if self._half:
            values, vectors = map(torch.from_numpy, scipy.linalg.eigh(mean.numpy(), driver="evd"))
        else:
            values, vectors = torch.linalg.eigh(mean)
        kept = vectors.flip(1)[:, :MAX_VECTORS].float().contiguous()
        return MomentBasis(values.flip(0).clamp_min(0.0).cpu(), kept.cpu(), self.tokens)

    def leading(self, k: int, name: str = "output") -> "MomentBasis":
        """Return the k leading eigenvalues and eigenvectors, at most n; errors as `eigen`.

        The others are not computed where that is quicker.
        """
        mean = self._mean(name, "gradients")
        n = mean.shape[0]
        k = min(k, n)
        if self._half:
            found = scipy.linalg.eigh(mean.numpy(), subset_by_index=[n - k, n - 1])
            values, vectors = map(torch.from_numpy, found)
        else:
            values, vectors = torch.linalg.eigh(mean)
            values, vectors = values[-k:].cpu(), vectors[:, -k:].cpu()
        values = values.flip(0).clamp_min(0.0)
        return MomentBasis(values, vectors.flip(1).float().contiguous(), self.tokens)

    def trailing(self, k: int, name: str = "input") -> "MomentBasis":
        """Return the k smallest eigenvalues, at most n, and their eigenvectors, descending; errors as `eigen`.

        Where the tokens do not span the space, the last of them span its null space, or a part of it.
        """
        mean = self._mean(name, "inputs")
        k = min(k, mean.shape[0])
        if self._half:
            values, vectors = map(
                torch.from_numpy, scipy.linalg.eigh(mean.numpy(), subset_by_index=[0, k - 1])
            )
        else:
            values, vectors = torch.linalg.eigh(mean)
            values, vectors = values[:k].cpu(), vectors[:, :k].cpu()
        values = values.flip(0).clamp_min(0.0)
        return MomentBasis(values, vectors.flip(1).float().contiguous(), self.tokens)

    def _mean(self, name: str, what: str) -> Tensor:
        if not self.tokens:
            raise FactorError(
                f"layer {name}: no token reached it while calibrating; use text that runs through it, or leave it out"
            )
        mean = self.total / self.tokens
        if not torch.isfinite(mean).all():
            raise FactorError(
                f"layer {name}: its {what} have NaN or Inf on the calibration text; calibrate in float32"
            )
        return mean


@dataclasses.dataclass(frozen=True, eq=False)
class MomentBasis:
    """Eigenvalues of a second moment, descending, float64, and the leading eigenvectors (n, q), fp32.

    All n eigenvalues, or the q that belong to the vectors; `tokens` is how many vectors were summed up. Energy and
    effective rank take all of them. Of `SecondMoment.trailing` both are the last ones.
    """

    values: Float[Tensor, " p"]
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

    def soft_shares(self, k: int) -> Float[Tensor, " p"]:
        """Return `λ_i / (λ_i + λ_k)`, what the filter `(I + C/λ_k)⁻¹` takes of each direction; 0 where λ_i = 0."""
        values = self.values.double()
        return torch.where(values > 0, values / (values + values[k - 1]), 0.0)

    def rank_for(self, energy: float) -> int:
        """Return the smallest k whose directions hold this share of the energy, at least 1."""
        return rank_for_energy(self.values, energy)
