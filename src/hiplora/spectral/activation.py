"""The activation basis: second moments of a layer's inputs and output gradients, factors made from them, and unions."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import scipy.linalg
import torch
from jaxtyping import Float
from torch import Tensor

from hiplora.errors import FactorError, FactorSettingError
from hiplora.spectral.factors import SpectralFactors, Triplets, full_precision, weight_fingerprint, widest
from hiplora.spectral.svd import as_matrix, certify

_CHUNK = 4096  # tokens that are in float64 at a time
_LEAST_BLOCK = 256  # columns: the call for a smaller product costs more than it saves
_INSIDE = 1e-4  # of a unit vector: what lies outside a subspace by less than this counts as inside
MAX_VECTORS = 2048  # leading eigenvectors kept of a wide input


@dataclasses.dataclass(frozen=True, eq=False)
class MomentBasis:
    """Eigenvalues of a second moment, descending, float64, and the leading eigenvectors (n, q), fp32.

    All n eigenvalues, or the q that belong to the vectors (`SecondMoment.trailing`: the last ones instead); `tokens` is
    how many vectors were summed up.
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


class SecondMoment:
    """Running sum of `xxᵀ` over vectors x (n,), one a token, in float64 (fp32 on devices that have none)."""

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        device = torch.device(device)
        self._sum = torch.zeros(width, width, dtype=widest(device), device=device)
        self._block = max(_LEAST_BLOCK, -(-width // 4))
        self.tokens = 0

    @property
    def total(self) -> Float[Tensor, "n n"]:
        """Return the sum, symmetric."""
        return self._sum.tril() + self._sum.tril(-1).T

    def add(self, inputs: Float[Tensor, "tokens n"]) -> None:
        """Add tokens; how they are split over calls changes the sum by rounding only."""
        with full_precision(self._sum.device):
            for chunk in inputs.detach().split(_CHUNK):
                upcast = chunk.to(self._sum)
                for start in range(0, len(self._sum), self._block):  # the lower triangle is enough: half the work
                    end = start + self._block
                    self._sum[start:end, :end].addmm_(upcast[:, start:end].T, upcast[:, :end])
        self.tokens += len(inputs)

    def eigen(self, name: str = "input") -> MomentBasis:
        """Return eigenvalues and leading eigenvectors of the mean `C = E[xxᵀ]`; FactorError: not finite."""
        basis = self._eigen(name, "inputs", None)
        return dataclasses.replace(basis, vectors=basis.vectors[:, :MAX_VECTORS].contiguous())

    def leading(self, k: int, name: str = "output") -> MomentBasis:
        """Return the k leading eigenvalues and eigenvectors, at most n; errors as `eigen`."""
        n = len(self._sum)
        return self._eigen(name, "gradients", (n - min(k, n), n - 1))

    def trailing(self, k: int, name: str = "input") -> MomentBasis:
        """Return the k smallest eigenvalues, at most n, and their eigenvectors, descending; errors as `eigen`."""
        return self._eigen(name, "inputs", (0, min(k, len(self._sum)) - 1))

    def _eigen(self, name: str, quantity: str, subset: tuple[int, int] | None) -> MomentBasis:
        """Return the eigenpairs of the mean, descending: all, or those of the ascending indices `subset`."""
        mean = self.total / self.tokens
        if not torch.isfinite(mean).all():
            raise FactorError(
                f"layer {name}: its {quantity} have NaN or Inf on the calibration text; calibrate in float32"
            )
        if subset is not None and mean.device.type == "cpu":
            values, vectors = map(torch.from_numpy, scipy.linalg.eigh(mean.numpy(), subset_by_index=subset))
        else:
            first, last = subset or (0, len(mean) - 1)
            values, vectors = (part[..., first : last + 1].cpu() for part in torch.linalg.eigh(mean))
        return MomentBasis(values.flip(0).clamp_min(0.0), vectors.flip(1).float().contiguous(), self.tokens)


def activation_factors(
    weight: Float[Tensor, "m n"],
    inputs: MomentBasis,
    k: int,
    sides: str = "input",
    outputs: MomentBasis | None = None,
    *,
    name: str = "weight",
) -> SpectralFactors:
    """Return the factors of a weight in the basis of what the layer computes.

    V spans the k leading eigenvectors of the input second moment C. U spans the images of V where only the input side
    is protected, so that `Wv_i = σ_i u_i` exactly; else the k leading eigenvectors of `outputs`, the second moment G
    of the gradients at the layer's output. To second order the KL divergence that an update ΔW causes is
    `½ E[(gᵀΔWx)²]`, under K-FAC's assumption `½ tr(GΔWCΔWᵀ)`. Both are rotated inside their subspaces so that `UᵀWV`
    is diagonal, `σ_i ≥ 0` descending: a gain δ_i is the change of one number, as in Eq. 2.

    Raises:
        FactorError: shapes do not fit, k exceeds min(m, n) or the eigenvectors given, or a value is not finite.
    """
    matrix = as_matrix(weight, k, name)
    m, n = matrix.shape
    for quantity, moment, width in (("inputs", inputs, n), ("outputs", outputs, m)):
        size, available = (0, 0) if moment is None else moment.vectors.shape
        if (quantity == "inputs" or sides != "input") and (size != width or available < k):
            raise FactorSettingError(
                f"layer {name}: principal_rank {k} takes as many directions of its {width} {quantity}, and the "
                f"calibration has {available} of {size} numbers; lower it, or calibrate on this very model"
            )
    with full_precision(matrix.device):
        upcast = matrix.to(widest(matrix.device))
        V = inputs.vectors[:, :k].to(upcast)
        if sides == "input" or outputs is None:
            U = torch.linalg.svd(upcast @ V, full_matrices=False).U
        else:
            U = outputs.vectors[:, :k].to(upcast)
        factors = _diagonal(matrix, upcast, U, V, "eigen")
        fields: dict[str, Any] = {"basis": f"activation:{sides}", "fingerprint": weight_fingerprint(weight)}
        if sides != "input" and outputs is not None:
            fields["shrink_U"] = _shrink(outputs, factors.U)
        if sides != "output":
            fields["shrink_V"] = _shrink(inputs, factors.V)
    return dataclasses.replace(factors, **fields)


def unite(bases: Sequence[Float[Tensor, "n _"]], rank: int) -> Float[Tensor, "n k"]:
    """Return an orthonormal basis of a sum of subspaces: the first, then what lies furthest outside, up to `rank`."""
    with full_precision(bases[0].device):
        union = bases[0].to(widest(bases[0].device))
        for basis in bases[1:]:
            outside = basis.to(union) - union @ (union.T @ basis.to(union))
            directions, lengths, _ = torch.linalg.svd(outside, full_matrices=False)
            union = torch.cat([union, directions[:, lengths > _INSIDE]], dim=1)
        return torch.linalg.qr(union[:, :rank]).Q.to(bases[0])


def united_factors(
    weight: Float[Tensor, "m n"], before: tuple[Float[Tensor, "m k"], Float[Tensor, "n k"]], later: SpectralFactors
) -> SpectralFactors:
    """Return the factors of a weight that protect the directions (U, V) of `before` and those of `later`.

    Both sides get as many directions, at most half of min(m, n), so that a complement to learn in is left.
    """
    limit = max(later.rank, before[0].shape[1], min(weight.shape) // 2)
    U, V = (unite([old, new.to(old)], limit) for old, new in zip(before, (later.U, later.V), strict=True))
    k = min(U.shape[1], V.shape[1])
    with full_precision(weight.device):
        upcast = weight.to(widest(weight.device))
        factors = _diagonal(weight, upcast, U[:, :k].to(upcast), V[:, :k].to(upcast), "union")
    return dataclasses.replace(factors, basis=later.basis, fingerprint=weight_fingerprint(weight))


def _diagonal(weight: Tensor, upcast: Tensor, U: Tensor, V: Tensor, method: str) -> SpectralFactors:
    """Rotate U (m, k) and V (n, k) inside their subspaces so that `UᵀWV` is diagonal; `upcast` is W in their dtype."""
    P, sigma, Qt = torch.linalg.svd(U.T @ upcast @ V)
    return certify(weight, Triplets(U @ P, sigma, V @ Qt.T), method)


def _shrink(moment: MomentBasis, directions: Float[Tensor, "n k"]) -> Float[Tensor, "k k"]:
    """Return the soft projection's `Qᵀ diag(λ_i/(λ_i + λ_k)) Q` in a basis rotated by Q; λ_i = 0 is no filter."""
    k = directions.shape[1]
    upcast = directions.to(widest(directions.device))
    rotation = moment.vectors[:, :k].to(upcast).T @ upcast
    return (rotation.T * moment.soft_shares(k)[:k].to(upcast) @ rotation).float()
