"""Projection of a trained update off the directions of the inputs that its layers really get."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from hiplora.adapters.update import KEPT, AdapterUpdate, Pair, balanced, product_norm
from hiplora.errors import ConfigError
from hiplora.spectral import EXPECTED_RANK, MomentBasis, RankSpec, is_rank, resolve_rank
from hiplora.tuner import PROJECTIONS

_JOINT_RANK = 4  # times an update's rank: the rank of the update without pairs of directions
_ROUNDING = 1e-5  # below this share of its former norm, a projected factor is rounding only


def check_projection(principal_rank: RankSpec, strength: float, projection: str) -> None:
    """Raise ConfigError if a setting of a projection makes no sense, naming the value and what was expected."""
    if not is_rank(principal_rank):
        raise ConfigError(f"principal_rank is {principal_rank!r}; expected {EXPECTED_RANK}")
    if not 0 <= strength <= 1:
        raise ConfigError(f"strength is {strength!r}; expected a number from 0 (nothing) to 1 (everything)")
    if projection not in PROJECTIONS:
        raise ConfigError(f"projection is {projection!r}; expected one of {', '.join(PROJECTIONS)}")


def module_rank(principal_rank: RankSpec, inputs: MomentBasis, module: str = "input") -> int:
    """Return how many directions a layer protects; ConfigError if more than there are eigenvectors."""
    width, available = inputs.vectors.shape
    k = resolve_rank(principal_rank, (width, width), lambda: inputs.values, capped=False)
    if k > available:
        raise ConfigError(
            f"layer {module}: principal_rank {principal_rank} (here {k}) exceeds the {available} eigenvectors that "
            f"are kept of its inputs, {width} wide; lower principal_rank, or give it as a fraction of the width (0.05) "
            "or a share of the energy (energy:0.9)"
        )
    return k


def project(
    A: Float[Tensor, "q n"], inputs: MomentBasis, k: int, strength: float = 1.0, projection: str = "hard"
) -> Float[Tensor, "q n"]:
    """Project the input side of an update off its layer's inputs: `A(I − s·E diag(c) Eᵀ)`, a new tensor.

    E (n, p) are the leading eigenvectors of the inputs' second moment C, s is the strength. Hard: c is 1 for the first
    k. Soft: `λ_i / (λ_i + λ_k)` of every eigenvector in `inputs`, the filter `I − (I + C/λ_k)⁻¹`; where λ_k = 0, its
    limit. Computed in float64 in 4qnp flops. A result that is rounding only becomes zero.
    """
    shares = torch.ones(k) if projection == "hard" else inputs.soft_shares(k)[: inputs.vectors.shape[1]]
    E, A64 = inputs.vectors[:, : len(shares)].double(), A.double()
    projected = A64 - ((A64 @ E) * (strength * shares.double())) @ E.T
    if projected.norm() <= _ROUNDING * A64.norm():
        return torch.zeros_like(A)
    return projected.to(A.dtype)


def without_pairs(factors: Pair, inputs: MomentBasis, outputs: MomentBasis, k: int) -> Float[Tensor, "m n"]:
    """Remove pairs of directions from an update, as few as give the hard projection's drift; return ΔW' in float64.

    To second order the KL divergence from the base is `½ tr(G ΔW C ΔWᵀ) = ½ Σ μ_i λ_j X_ij²`, with λ, E the
    eigenpairs of the inputs' second moment C, μ, F those of the output gradients' moment G, and `X = Fᵀ ΔW E`. The
    entries with the largest μ_i λ_j become zero until no more of the sum is left than without the first k columns
    (masks of pairs: CrispEdit, arXiv 2602.15823).
    """
    A, B = (factor.double() for factor in factors)
    E, F = inputs.vectors.double(), outputs.vectors.double()
    weights = outputs.values.double()[: F.shape[1], None] * inputs.values.double()[: E.shape[1]]
    X = (F.T @ B) @ (A @ E)
    order = weights.flatten().argsort(descending=True, stable=True)
    energy = (weights * X.square()).flatten()[order]
    remaining_energy = energy.sum() - energy.cumsum(0)
    allowed = (weights * X.square())[:, k:].sum() + 1e-12 * energy.sum()
    removed = torch.zeros_like(X).flatten()
    removed[order[: int((remaining_energy > allowed).sum()) + 1]] = 1.0
    return B @ A - F @ (removed.view_as(X) * X) @ E.T


def protect(
    update: AdapterUpdate,
    bases: Mapping[str, MomentBasis],
    principal_rank: RankSpec = 32,
    strength: float = 1.0,
    projection: str = "hard",
    outputs: Mapping[str, MomentBasis] | None = None,
) -> AdapterUpdate:
    """Project every module of an update off the directions of its layer's inputs: a plain update of the same ranks.

    Tensors of `modules_to_save` are not projected.

    Args:
        update: the trained adapter; a HiP-LoRA adapter's two channels become one.
        bases: module → eigenvectors of its inputs' second moment (`hiplora.tuner.calibration.input_bases`).
        principal_rank: k: a number, a fraction of the layer's width, or "energy:0.95".
        strength: s from 0, which leaves the update as it is, to 1, which removes the directions altogether.
        projection: "hard" removes the first k alike; "soft" removes each direction by how strong it is.
        outputs: module → eigenvectors of the second moment of the gradients at its outputs: removes pairs of directions
            instead (`without_pairs`), and cuts the result to four times the update's rank.

    Raises:
        ConfigError: a value makes no sense, or a layer has fewer directions than it is to protect.
    """
    check_projection(principal_rank, strength, projection)
    factors = {}
    for module, (A, B) in update.factors.items():
        k = module_rank(principal_rank, bases[module], module)
        if outputs is None:
            factors[module] = project(A, bases[module], k, strength, projection), B
            continue
        U, sigma, Vt = torch.linalg.svd(without_pairs((A, B), bases[module], outputs[module], k), full_matrices=False)
        q = min(_JOINT_RANK * A.shape[0], len(sigma))
        factors[module] = balanced(U[:, :q], sigma[:q], Vt[:q].T)
    config = {"peft_type": "LORA"} | {key: update.config.get(key) for key in KEPT}
    projection = "joint" if outputs is not None else projection
    settings = f"principal_rank={principal_rank}, projection={projection}, strength={strength:g}"
    source = f"{update.source} projected off its layers' inputs ({settings})"
    return replace(update, kind="projected", config=config, factors=factors, channels={}, source=source)


def remaining(before: AdapterUpdate, after: AdapterUpdate) -> tuple[dict[str, float], float]:
    """Return which share of ‖ΔW‖² remains, per module and of all together; 0 where there was none."""
    energies = {
        module: [product_norm(B, A) ** 2 for A, B in (pair, after.factors[module])]
        for module, pair in before.factors.items()
    }
    total = [math.fsum(energy) for energy in zip(*energies.values(), strict=True)]
    return {module: _share(*energy) for module, energy in energies.items()}, _share(*total)


def _share(whole: float, part: float) -> float:
    return part / whole if whole else 0.0
