"""Projection of a trained update off the directions of the inputs that its layers really get."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hiplora.adapters.adapter import AdapterUpdate
from hiplora.adapters.check import product_norm
from hiplora.adapters.lora import CARRIED, SELECTION
from hiplora.errors import ConfigError
from hiplora.spectral import EXPECTED_RANK, MomentBasis, RankSpec, is_rank
from hiplora.spectral.moments import MAX_VECTORS
from hiplora.tuner.config import PROJECTIONS

_KEPT_CONFIG = (*SELECTION, *CARRIED, "base_precision", "fan_in_fan_out")
_ROUNDING = 1e-5  # a factor that is cut to less than this share of its norm has nothing left but rounding
_NO_WRAP: Callable[[Iterable[str]], Iterable[str]] = iter


@dataclass(frozen=True)
class Remaining:
    """What a projection left of one module's update, for inputs of `width` numbers and `k` directions.

    `norm` is ‖ΔW‖_F, `output_energy` is `E‖ΔWx‖² = tr(ΔW C ΔWᵀ)` over the calibration text, each before and after.
    """

    module: str
    width: int
    k: int
    norm: tuple[float, float]
    output_energy: tuple[float, float]

    @property
    def norm_share(self) -> float:
        """Share of ‖ΔW‖_F² that is left, 0 to 1; 0 of nothing."""
        return _share(*(value**2 for value in self.norm))

    @property
    def energy_share(self) -> float:
        """Share of the output energy on the calibration text that is left, 0 to 1; 0 of nothing."""
        return _share(*self.output_energy)

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-ready record."""
        return asdict(self) | {"norm_share": self.norm_share, "energy_share": self.energy_share}


def check_projection(principal_rank: RankSpec, strength: float, projection: str) -> None:
    """Refuse a projection that makes no sense for any layer.

    Raises:
        ConfigError: naming the value, and what was expected.
    """
    if not is_rank(principal_rank):
        raise ConfigError(f"principal_rank is {principal_rank!r}; expected {EXPECTED_RANK}")
    number = isinstance(strength, (int, float)) and not isinstance(strength, bool)
    if not number or not 0 <= strength <= 1:
        raise ConfigError(f"strength is {strength!r}; expected a number from 0 (nothing) to 1 (everything)")
    if projection not in PROJECTIONS:
        raise ConfigError(f"projection is {projection!r}; expected one of {', '.join(PROJECTIONS)}")


def check_widths(update: AdapterUpdate, principal_rank: RankSpec) -> None:
    """Refuse a rank that a layer cannot have, where that can be told before its inputs are measured.

    Raises:
        ConfigError: naming the layer.
    """
    if isinstance(principal_rank, str):
        return
    for module, (A, _) in update.factors.items():
        width = A.shape[1]
        k = _given_rank(principal_rank, width)
        _check_kept(module, k, principal_rank, width, min(width, MAX_VECTORS))


def module_rank(principal_rank: RankSpec, inputs: MomentBasis, module: str = "input") -> int:
    """Return how many directions a layer protects: a number, a fraction of its width, or "energy:0.95".

    Raises:
        ConfigError: more than the eigenvectors that are kept.
    """
    width, kept = inputs.vectors.shape
    if isinstance(principal_rank, str):  # nothing is to be learned beside: no cap, as training has
        k = inputs.rank_for(float(principal_rank.partition(":")[2]))
    else:
        k = _given_rank(principal_rank, width)
    _check_kept(module, k, principal_rank, width, kept)
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

    E (n, p) are the leading eigenvectors of the inputs' second moment C, c is `removal`, s the strength. Computed
    in float64 in 4qnp flops, without forming the projector. What is rounding only becomes zero.

    Args:
        A: the factor of the update `BA` that reads the layer's inputs.
        inputs: the eigenvectors of C.
        k: number of protected directions.
        strength: from 0, which returns equal values, to 1.
        projection: "hard" or "soft".
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
    *,
    wrap: Callable[[Iterable[str]], Iterable[str]] = _NO_WRAP,
) -> AdapterUpdate:
    """Project every module of an update off the directions of its layer's inputs; nothing is trained.

    The result is a plain update of the same ranks: what was in HiP-LoRA's two channels is in its factors. Tensors of
    `modules_to_save` are not projected.

    Args:
        update: the trained adapter.
        bases: module → eigenvectors of its inputs' second moment (`hiplora.tuner.calibration.input_bases`).
        principal_rank: k: a number, a fraction of the layer's width, or "energy:0.95".
        strength: s from 0, which leaves the update as it is, to 1, which takes the directions away altogether.
        projection: "hard" takes the first k alike; "soft" takes each direction by how strong it is.
        wrap: called with the module names, yields them; for a progress bar.

    Raises:
        ConfigError: a value makes no sense, or a layer has fewer directions than it is to protect.
    """
    check_projection(principal_rank, strength, projection)
    factors = dict(update.factors)
    for module in wrap(list(factors)):
        A, B = factors[module]
        k = module_rank(principal_rank, bases[module], module)
        factors[module] = project(A, bases[module], k, strength, projection), B
    config = {key: update.config.get(key) for key in _KEPT_CONFIG}
    done = f"principal_rank={principal_rank}, projection={projection}, strength={strength:g}"
    return replace(
        update,
        kind="projected",
        config={"peft_type": "LORA", **config},
        factors=factors,
        channels={},
        source=f"{update.source} projected off its layers' inputs ({done})",
    )


def remaining(
    before: AdapterUpdate,
    after: AdapterUpdate,
    bases: Mapping[str, MomentBasis],
    principal_rank: RankSpec = 32,
) -> list[Remaining]:
    """Return, module by module, how much a projection left of an update and of what it does on the text."""
    rows = []
    for module, inputs in ((module, bases[module]) for module in before.factors):
        pairs = before.factors[module], after.factors[module]
        norms = [product_norm(B, A) for A, B in pairs]
        energies = [output_energy(A, B, inputs) for A, B in pairs]
        k = module_rank(principal_rank, inputs, module)
        width = inputs.vectors.shape[0]
        rows.append(Remaining(module, width, k, (norms[0], norms[1]), (energies[0], energies[1])))
    return rows


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


def totals(rows: Iterable[Remaining]) -> dict[str, float]:
    """Return `norm_share` and `energy_share` of all modules together."""
    rows = list(rows)
    norms = [math.fsum(row.norm[i] ** 2 for row in rows) for i in (0, 1)]
    energies = [math.fsum(row.output_energy[i] for row in rows) for i in (0, 1)]
    return {"norm_share": _share(*norms), "energy_share": _share(*energies)}


def _share(before: float, after: float) -> float:
    return after / before if before else 0.0


def _given_rank(spec: int | float, width: int) -> int:
    return spec if isinstance(spec, int) else min(max(round(spec * width), 1), width)


def _check_kept(module: str, k: int, spec: RankSpec, width: int, kept: int) -> None:
    if k > kept:
        asked = f"principal_rank {spec}" + ("" if k == spec else f", which is {k} here,")
        raise ConfigError(
            f"layer {module}: {asked} exceeds the {kept} eigenvectors that are kept of its inputs, {width} wide; "
            "lower principal_rank, or give it as a fraction of the width (0.05) or a share of the energy (energy:0.9)"
        )
