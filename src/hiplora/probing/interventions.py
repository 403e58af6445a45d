"""Zero, Flip and Noise: change one direction of one weight at a time; record what the model loses (HiP-LoRA, C.1.1)."""

import contextlib
import math
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hiplora.adapters import module_place
from hiplora.adapters.base import weight_of
from hiplora.errors import ConfigError
from hiplora.evaluation.mounting import holding
from hiplora.spectral import MomentBasis, activation_factors, truncated_svd
from hiplora.tuner import HipLoraConfig, find_targets

PROTECTED = 32  # directions of the activation basis; the default of HipLoraConfig.principal_rank


@dataclass(frozen=True, eq=False)
class Direction:
    """A rank-1 component `σ u vᵀ` of a module's weight (m, n), the `index`-th of `rank`; `relative` is σ_i/σ_1."""

    module: str
    index: int
    rank: int
    sigma: float
    relative: float
    u: Float[Tensor, " m"]
    v: Float[Tensor, " n"]


def find_modules(
    model: nn.Module, target_modules: str | list[str] | None = None, layers: Collection[int] | None = None
) -> list[str]:
    """Return the names of the layers that an adapter with these target modules would be on, in the model's order.

    `target_modules` as in PEFT, or None for the attention projections; `layers` keeps some layers only. ConfigError if
    nothing matches, or a layer has no match.
    """
    config = HipLoraConfig(preset="paper", target_modules=target_modules, principal_rank=1)
    layer_of = {target.name: module_place(target.name)["layer"] for target in find_targets(model, config)}
    if missing := sorted(set(layers or ()) - set(layer_of.values())):
        numbers = ", ".join(map(str, sorted({number for number in layer_of.values() if number is not None})))
        raise ConfigError(
            f"layer {missing[0]} has none of the requested modules; they are in layers {numbers or 'without a number'}"
        )
    return [name for name, number in layer_of.items() if layers is None or number in layers]


def choose_directions(size: int, count: int, how: str = "log") -> list[int]:
    """Return `count` different indices among `size`, ascending, from the first to the last.

    `how` is `"log"` (evenly in the logarithm of the position: dense among the strong ones) or `"even"`. ConfigError if
    `count` is not in 1…size.
    """
    if not 1 <= count <= size:
        raise ConfigError(f"{count} directions of {size}: expected 1 to {size}; give another number")
    spaced = np.geomspace(1, size, count) - 1 if how == "log" else np.linspace(0, size - 1, count)
    indices = np.rint(spaced).astype(int).tolist()
    for i in range(1, count):  # separate those that round to the same index
        indices[i] = max(indices[i], indices[i - 1] + 1)
    return [min(index, size - count + i) for i, index in enumerate(indices)]


def directions_of(
    model: nn.Module,
    modules: Iterable[str],
    count: int,
    how: str = "log",
    *,
    rank: int | None = None,
    bases: Mapping[str, MomentBasis] | None = None,
) -> Iterator[Direction]:
    """Yield `count` directions of each module's weight (see `choose_directions`), from an exact decomposition.

    They are among the leading `rank` directions; None is all of them. With `bases` (`tuner.input_bases`) they are those
    of the activation basis (`spectral.activation_factors`), of which there are `rank`, or 32: removing one silences the
    layer's answer to one input. FactorError if a weight cannot be decomposed.
    """
    for name in modules:
        matrix = weight_of(model.get_submodule(name))
        size = min(matrix.shape)
        if bases is None:
            factors = truncated_svd(matrix, min(rank or size, size), method="exact", name=name)
        else:  # in the span of all inputs it would be the weight's own basis
            k = min(rank or PROTECTED, size)
            factors = activation_factors(matrix.cpu(), bases[name], k, name=name).to(matrix.device)
        try:
            chosen = choose_directions(factors.rank, count, how)
        except ConfigError as error:
            raise ConfigError(f"layer {name}: {error}") from None
        sigma = factors.sigma.tolist()
        for i in chosen:
            relative = sigma[i] / sigma[0] if sigma[0] else 0.0
            yield Direction(
                name, i, factors.rank, sigma[i], relative, factors.U[:, i].clone(), factors.V[:, i].clone()
            )


def intervention_factor(kind: str, normal: float = 0.0) -> float:
    """Return c of `W + c σ u vᵀ`: −1 for zero, −2 for flip, S times a draw of N(0, 1) for noise_S; else ConfigError."""
    if kind in ("zero", "flip"):
        return -1.0 if kind == "zero" else -2.0
    with contextlib.suppress(ValueError):
        scale = float(kind.removeprefix("noise_"))
        if kind.startswith("noise_") and 0 < scale < math.inf:
            return scale * normal
    raise ConfigError(f"intervention {kind!r}: expected zero, flip, or noise_S such as noise_0.1")


@contextlib.contextmanager
def intervened(model: nn.Module, direction: Direction, factor: float) -> Iterator[nn.Module]:
    """Replace a module's weight by `W + factor · σ u vᵀ` inside the block; restore the very same weight on exit.

    The sum is made in fp32 and rounded to the weight's own precision. A weight that is tied to it is left alone.
    """
    module: Any = model.get_submodule(direction.module)
    weight, sides = module.weight.detach(), [direction.u, direction.v]
    if isinstance(module, Conv1D):  # stored as (in, out)
        sides.reverse()
    precise = weight.to(torch.promote_types(weight.dtype, torch.float32))
    changed = torch.addr(precise, *(side.to(precise) for side in sides), alpha=factor * direction.sigma)
    changed = nn.Parameter(changed.to(weight.dtype), requires_grad=False)
    with holding(model, {f"{direction.module}.weight": changed}):
        yield model


def probe(
    model: nn.Module,
    directions: Iterable[Direction],
    kinds: Sequence[str],
    measure: Callable[[nn.Module], Mapping[str, float]],
    *,
    draws: int = 1,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Apply each of the interventions `kinds` to each direction, one at a time, and return a row for each, in order.

    A row has `module`, `layer`, `type`, `index`, `rank`, `sigma`, `relative`; the intervention's `kind`, the number of
    the noise's `draw`, its `factor`; and `drop`, what `measure` returned for the intervened model: by name how much
    worse it became, None where that is not finite. Noise is drawn `draws` times; a draw depends on `seed`, module,
    index and its number alone, so noises of two scales differ by the scale. The bare model is left as it was.
    """
    rows = []
    for direction in directions:
        labels = module_place(direction.module)
        labels |= {name: getattr(direction, name) for name in ("index", "rank", "sigma", "relative")}
        for kind in kinds:
            for draw in range(draws if kind.startswith("noise") else 1):
                entropy = [seed, zlib.crc32(direction.module.encode()), direction.index, draw]
                factor = float(intervention_factor(kind, np.random.default_rng(entropy).standard_normal()))
                with intervened(model, direction, factor):
                    losses = measure(model)
                drop = {name: float(loss) if math.isfinite(loss) else None for name, loss in losses.items()}
                rows.append({**labels, "kind": kind, "draw": draw, "factor": factor, "drop": drop})
    return rows
