"""Which directions of which weights are probed, and what those directions are."""

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hiplora.errors import ConfigError
from hiplora.probing.modules import layer_of, linear_weight
from hiplora.spectral import MomentBasis, SpectralFactors, activation_factors, truncated_svd

CHOICES = ("log", "even", "energy", "random")
PROTECTED = 32  # of the activation basis; the default of HipLoraConfig.principal_rank


@dataclass(frozen=True, eq=False)
class Direction:
    """One rank-1 component `σ u vᵀ` of a module's weight (m, n).

    u (m,) and v (n,) are of unit length, fp32. `index` counts from 0, the strongest, up to `rank` − 1: one of so many
    directions; `relative` is `σ_i / σ_1`. `layer` is the first number in the module's name, None where it has none,
    and `type` the last part of it (`q_proj`).
    """

    module: str
    index: int
    rank: int
    sigma: float
    relative: float
    u: Float[Tensor, " m"]
    v: Float[Tensor, " n"]

    @property
    def layer(self) -> int | None:
        """Number of the layer that the module is in."""
        return layer_of(self.module)

    @property
    def type(self) -> str:
        """The module's own name, the same in every layer."""
        return self.module.rpartition(".")[2]


def choose_directions(
    sigma: Sequence[float] | Float[Tensor, " k"], count: int, how: str = "log", seed: int = 0
) -> list[int]:
    """Return the indices, ascending, of `count` different directions of a spectrum σ (k,), descending.

    `how` is `"log"` (from the first to the last, evenly in the logarithm of the place: dense among the strong ones),
    `"even"` (from the first to the last at equal distances), `"energy"` (the middles of `count` parts with equal shares
    of Σσ²) or `"random"` (without replacement, by `seed`; the others do not depend on it).

    Raises:
        ConfigError: `how` is unknown, `count` is not in 1…k, or energy was asked of a spectrum of zeros.
    """
    if how not in CHOICES:
        raise ConfigError(f"choice of directions {how!r}: expected one of {', '.join(CHOICES)}")
    gains = np.asarray(sigma, dtype=np.float64)
    size = len(gains)
    if not 1 <= count <= size:
        raise ConfigError(f"{count} directions of {size}: expected 1 to {size}; give another number")
    if how == "random":
        return sorted(np.random.default_rng(seed).choice(size, count, replace=False).tolist())
    if how == "log":
        places = np.geomspace(1, size, count) - 1
    elif how == "even":
        places = np.linspace(0, size - 1, count)
    else:
        places = _energy_middles(gains, count)
    return _distinct(np.rint(places).astype(int).tolist(), size)


def directions_of(
    model: nn.Module,
    modules: Iterable[str],
    count: int,
    how: str = "log",
    *,
    seed: int = 0,
    rank: int | None = None,
    bases: Mapping[str, MomentBasis] | None = None,
) -> Iterator[Direction]:
    """Yield the chosen directions of each module's weight, module by module, from an exact decomposition.

    They are chosen among the leading `rank` directions, or as many as a weight has; None is all of them. With `bases`
    (`hiplora.tuner.input_bases`) they are those of the activation basis (`spectral.activation_factors`), of
    which there are only as many as are protected: `rank`, or 32. Removing one silences the layer's answer to one input.

    A module's weight is decomposed when its first direction is asked for; only the chosen vectors are kept.

    Raises:
        ConfigError: a module is missing or not a linear layer with a weight of floats; or as `choose_directions`.
        FactorError: a weight cannot be decomposed.
    """
    for name in modules:
        layer, weight = linear_weight(model, name)
        matrix = weight.detach().T if isinstance(layer, Conv1D) else weight.detach()
        factors = _factors(matrix, name, rank, bases)
        strongest = factors.sigma[0].item()
        try:
            # Of its own for each module, else all would give the same places.
            chosen = choose_directions(factors.sigma.cpu(), count, how, seed + zlib.crc32(name.encode()))
        except ConfigError as error:
            raise ConfigError(f"layer {name}: {error}") from None
        for index in chosen:
            sigma = factors.sigma[index].item()
            relative = sigma / strongest if strongest else 0.0
            u, v = factors.U[:, index].clone(), factors.V[:, index].clone()
            yield Direction(name, index, factors.rank, sigma, relative, u, v)


def _factors(
    matrix: Tensor, name: str, rank: int | None, bases: Mapping[str, MomentBasis] | None
) -> SpectralFactors:
    size = min(matrix.shape)
    if rank is not None and rank < 1:
        raise ConfigError(f"rank is {rank}; expected at least 1, or None for every direction")
    if bases is None:
        return truncated_svd(matrix, min(rank or size, size), method="exact", name=name)
    # In the span of all inputs the basis of the activations would be the weight's own.
    inputs, k = bases[name], min(rank or PROTECTED, size)
    return activation_factors(matrix.cpu(), inputs, k, name=name).to(matrix.device)


def _energy_middles(gains: np.ndarray, count: int) -> np.ndarray:
    energy = np.cumsum(gains**2)
    if not energy[-1] > 0:
        raise ConfigError("all singular values are 0: there is no energy to choose by; leave the layer out")
    return np.searchsorted(energy / energy[-1], (np.arange(count) + 0.5) / count)


def _distinct(places: list[int], size: int) -> list[int]:
    """Move ascending places apart to different ones in 0…size − 1, each as little as need be."""
    last = -math.inf
    for at, place in enumerate(places):
        places[at] = last = int(max(place, last + 1))
    return [min(place, size - len(places) + at) for at, place in enumerate(places)]
