"""Projection of a trained update off the directions of the inputs that its layers really get."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hiplora.adapters.lora import CARRIED, SELECTION
from hiplora.adapters.update import AdapterUpdate, product_norm
from hiplora.errors import ConfigError
from hiplora.spectral import EXPECTED_RANK, MomentBasis, RankSpec, is_rank
from hiplora.tuner import PROJECTIONS

_KEPT_CONFIG = (*SELECTION, *CARRIED, "base_precision", "fan_in_fan_out")
_ROUNDING = 1e-5  # a factor that is cut to less than this share of its norm has nothing left but rounding


def check_projection(principal_rank: RankSpec, strength: float, projection: str) -> None:
    """Raise ConfigError if a setting of a projection makes no sense, naming the value and what was expected."""
    if not is_rank(principal_rank):
        raise ConfigError(f"principal_rank is {principal_rank!r}; expected {EXPECTED_RANK}")
    if not 0 <= strength <= 1:
        raise ConfigError(f"strength is {strength!r}; expected a number from 0 (nothing) to 1 (everything)")
    if projection not in PROJECTIONS:
        raise ConfigError(f"projection is {projection!r}; expected one of {', '.join(PROJECTIONS)}")


def module_rank(principal_rank: RankSpec, inputs: MomentBasis, module: str = "input") -> int:
    """Return how many directions a layer protects: a number, a fraction of its width, or "energy:0.95".

    Raises:
        ConfigError: more than the eigenvectors that are kept.
    """
    width, kept = inputs.vectors.shape
    if isinstance(principal_rank, str):  # nothing is to be learned beside, so no cap, unlike in training
        k = inputs.rank_for(float(principal_rank.partition(":")[2]))
    elif isinstance(principal_rank, float):
        k = min(max(round(principal_rank * width), 1), width)
    else:
        k = principal_rank
    if k > kept:
        raise ConfigError(
            f"layer {module}: principal_rank {principal_rank} (here {k}) exceeds the {kept} eigenvectors that are kept "
            f"of its inputs, {width} wide; lower principal_rank, or give it as a fraction of the width (0.05) or a "
            "share of the energy (energy:0.9)"
        )
    return k


def removal(inputs: MomentBasis, k: int, projection: str = "hard") -> Float[Tensor, " p"]:
    """Return which part c_i of each leading eigenvector a projection of strength 1 takes away, in float64.

    Hard: all of the first k (p = k). Soft: `λ_i / (λ_i + λ_k)` of every eigenvector that is kept, the filter
    `I − (I + C/λ_k)⁻¹`; where λ_k = 0, its limit: all of the directions in which there is any input.
    """
    if projection == "hard":
        return torch.ones(k, dtype=torch.float64)
    return inputs.soft_shares(k)[: inputs.vectors.shape[1]]


def project(
    A: Float[Tensor, "q n"], inputs: MomentBasis, k: int, strength: float = 1.0, projection: str = "hard"
) -> Float[Tensor, "q n"]:
    """Project the input side of an update off its layer's inputs: `A(I − s·E diag(c) Eᵀ)`, a new tensor.

    E (n, p) are the leading eigenvectors of the inputs' second moment C, c is `removal` with k directions, s the
    strength; s = 0 returns equal values. Computed in float64 in 4qnp flops, without forming the projector. What is
    rounding only becomes zero.
    """
    taken = strength * removal(inputs, k, projection)
    E, wide = inputs.vectors[:, : len(taken)].double(), A.double()
    projected = wide - ((wide @ E) * taken) @ E.T
    if projected.norm() <= _ROUNDING * wide.norm():
        return torch.zeros_like(A)
    return projected.to(A.dtype)


def protect(
    update: AdapterUpdate,
    bases: Mapping[str, MomentBasis],
    principal_rank: RankSpec = 32,
    strength: float = 1.0,
    projection: str = "hard",
) -> AdapterUpdate:
    """Project every module of an update off the directions of its layer's inputs; nothing is trained.

    The result is a plain update of the same ranks: HiP-LoRA's two channels are in its factors. Tensors of
    `modules_to_save` are not projected.

    Args:
        update: the trained adapter.
        bases: module → eigenvectors of its inputs' second moment (`hiplora.tuner.calibration.input_bases`).
        principal_rank: k: a number, a fraction of the layer's width, or "energy:0.95".
        strength: s from 0, which leaves the update as it is, to 1, which takes the directions away altogether.
        projection: "hard" takes the first k alike; "soft" takes each direction by how strong it is.

    Raises:
        ConfigError: a value makes no sense, or a layer has fewer directions than it is to protect.
    """
    check_projection(principal_rank, strength, projection)
    factors = {}
    for module, (A, B) in update.factors.items():
        k = module_rank(principal_rank, bases[module], module)
        factors[module] = project(A, bases[module], k, strength, projection), B
    config = {"peft_type": "LORA"} | {key: update.config.get(key) for key in _KEPT_CONFIG}
    done = f"principal_rank={principal_rank}, projection={projection}, strength={strength:g}"
    source = f"{update.source} projected off its layers' inputs ({done})"
    return replace(update, kind="projected", config=config, factors=factors, channels={}, source=source)


def remaining(
    before: AdapterUpdate,
    after: AdapterUpdate,
    bases: Mapping[str, MomentBasis],
    principal_rank: RankSpec = 32,
) -> list[dict[str, Any]]:
    """Return, module by module, how much a projection left of an update and of what it does on the text.

    A row has: module, width (of the inputs), k, norm (‖ΔW‖_F) and output_energy (`E‖ΔWx‖²` over the calibration
    text), each before and after, norm_share and energy_share, the shares of ‖ΔW‖_F² and of the energy that are left.
    """
    rows = []
    for module in before.factors:
        inputs, pairs = bases[module], (before.factors[module], after.factors[module])
        row = {
            "module": module,
            "width": inputs.vectors.shape[0],
            "k": module_rank(principal_rank, inputs, module),
            "norm": [product_norm(B, A) for A, B in pairs],
            "output_energy": [output_energy(A, B, inputs) for A, B in pairs],
        }
        rows.append(row | totals([row]))
    return rows


def totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return `norm_share` and `energy_share` of some rows of `remaining` together; 0 where there was nothing."""
    norms = [math.fsum(row["norm"][i] ** 2 for row in rows) for i in (0, 1)]
    energies = [math.fsum(row["output_energy"][i] for row in rows) for i in (0, 1)]
    shares = {"norm_share": norms, "energy_share": energies}
    return {name: after / before if before else 0.0 for name, (before, after) in shares.items()}


def output_energy(A: Float[Tensor, "q n"], B: Float[Tensor, "m q"], inputs: MomentBasis) -> float:
    """Return `E‖BAx‖² = tr(BA C AᵀBᵀ)`, what an update adds to its layer's output per token, in float64.

    Exact where all eigenvectors of C are kept. Of a wider input those beyond the kept ones count with the mean of
    their eigenvalues, none of which exceeds the last that is kept.
    """
    kept = inputs.vectors.shape[1]
    R = torch.linalg.qr(B.double(), mode="r").R
    E, wide, values = inputs.vectors.double(), A.double(), inputs.values.double()
    seen = wide @ E
    energy = (R @ seen).square().sum(dim=0) @ values[:kept]
    if kept < len(values):
        energy = energy + values[kept:].mean() * (R @ (wide - seen @ E.T)).square().sum()
    return energy.item()
