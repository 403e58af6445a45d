"""Zero, Flip and Noise: change one direction of one weight at a time; record what the model loses (HiP-LoRA, C.1.1)."""

import contextlib
import math
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hiplora.errors import ConfigError, DataError
from hiplora.spectral import MomentBasis, activation_factors, truncated_svd
from hiplora.tuner import HipLoraConfig, find_targets

CHOICES = ("log", "even", "random")
PROTECTED = 32  # directions of the activation basis; the default of HipLoraConfig.principal_rank

Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Direction:
    """One rank-1 component `σ u vᵀ` of a module's weight (m, n).

    u (m,) and v (n,) have unit length, fp32. `index` runs from 0, the strongest, to `rank` − 1; `relative` is σ_i/σ_1.
    """

    module: str
    index: int
    rank: int
    sigma: float
    relative: float
    u: Float[Tensor, " m"]
    v: Float[Tensor, " n"]


def find_modules(
    model: nn.Module,
    target_modules: str | list[str] | None = None,
    layers: Collection[int] | None = None,
) -> list[str]:
    """Return the names of the layers that an adapter with these target modules would be on, in the model's order.

    `target_modules` as in PEFT: ends of names, a regular expression, `"all-linear"`, or None for the attention
    projections; `layers` keeps some layers only.

    Raises:
        ConfigError: nothing matches, or a layer has no match.
    """
    config = HipLoraConfig(preset="paper", target_modules=target_modules)
    found = [target.name for target in find_targets(model, config)]
    numbers = {layer_of(name) for name in found}
    if missing := sorted(set(layers or ()) - numbers):
        known = ", ".join(str(number) for number in sorted(n for n in numbers if n is not None))
        raise ConfigError(
            f"layer {missing[0]} has none of the requested modules; they are in layers {known or 'without a number'}"
        )
    return [name for name in found if layers is None or layer_of(name) in layers]


def layer_of(module: str) -> int | None:
    """Return the first number in a module's name, which is that of its layer; None if it has none."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", module)
    return int(found.group(1)) if found else None


def linear_weight(model: nn.Module, name: str) -> tuple[Any, nn.Parameter]:
    """Return a linear layer of a bare model and its weight as it is stored.

    Raises:
        ConfigError: the model has no such layer, or its weight does not hold floats.
    """
    try:
        module: Any = model.get_submodule(name)
    except AttributeError:
        raise ConfigError(f"the model has no layer {name}; name one that it has") from None
    if not isinstance(module, (nn.Linear, Conv1D)) or not module.weight.is_floating_point():
        raise ConfigError(
            f"layer {name}: is a {type(module).__name__}; probing takes linear layers of a bare model, without "
            "adapters and quantisation"
        )
    return module, module.weight


def choose_directions(size: int, count: int, how: str = "log", seed: int = 0) -> list[int]:
    """Return the indices, ascending, of `count` different directions among `size`, sorted by descending σ.

    `how` is `"log"` (from the first to the last, evenly in the logarithm of the place: dense among the strong ones),
    `"even"` (from the first to the last at equal distances) or `"random"` (without replacement, by `seed`).

    Raises:
        ConfigError: `how` is unknown, or `count` is not in 1…size.
    """
    if how not in CHOICES:
        raise ConfigError(f"choice of directions {how!r}: expected one of {', '.join(CHOICES)}")
    if not 1 <= count <= size:
        raise ConfigError(f"{count} directions of {size}: expected 1 to {size}; give another number")
    if how == "random":
        return sorted(np.random.default_rng(seed).choice(size, count, replace=False).tolist())
    spaced = np.geomspace(1, size, count) - 1 if how == "log" else np.linspace(0, size - 1, count)
    places = np.rint(spaced).astype(int).tolist()
    for at in range(1, count):  # move apart those that round to the same place
        places[at] = max(places[at], places[at - 1] + 1)
    return [min(place, size - count + at) for at, place in enumerate(places)]


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

    They are chosen among the leading `rank` directions; None is all of them. With `bases` (`tuner.input_bases`) they
    are those of the activation basis (`spectral.activation_factors`), of which there are `rank`, or 32. Removing one
    silences the layer's answer to one input.

    Raises:
        ConfigError: a module is missing or not a linear layer with a weight of floats; or as `choose_directions`.
        FactorError: a weight cannot be decomposed.
    """
    for name in modules:
        layer, weight = linear_weight(model, name)
        matrix = weight.detach().T if isinstance(layer, Conv1D) else weight.detach()
        size = min(matrix.shape)
        if bases is None:
            factors = truncated_svd(matrix, min(rank or size, size), method="exact", name=name)
        else:  # in the span of all inputs it would be the weight's own basis
            k = min(rank or PROTECTED, size)
            factors = activation_factors(matrix.cpu(), bases[name], k, name=name).to(matrix.device)
        try:  # each module has random places of its own
            chosen = choose_directions(factors.rank, count, how, seed + zlib.crc32(name.encode()))
        except ConfigError as error:
            raise ConfigError(f"layer {name}: {error}") from None
        sigma = factors.sigma.tolist()
        for index in chosen:
            relative = sigma[index] / sigma[0] if sigma[0] else 0.0
            u, v = factors.U[:, index].clone(), factors.V[:, index].clone()
            yield Direction(name, index, factors.rank, sigma[index], relative, u, v)


def intervention_factor(kind: str, normal: float = 0.0) -> float:
    """Return c of `W + c σ u vᵀ`: −1 for zero, −2 for flip, ε ~ N(0, S²) for noise_S; `normal` is a draw of N(0, 1).

    Raises:
        ConfigError: there is no such intervention.
    """
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

    The sum is made in fp32 and rounded to the weight's own precision. The changed weight is a parameter of its own:
    one that is tied to another leaves that alone. Works for `nn.Linear` and for GPT-2's `Conv1D`.

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
        module.weight = nn.Parameter(changed.to(weight.dtype), requires_grad=False)
    try:
        yield model
    finally:
        module.weight = weight


def probe(
    model: nn.Module,
    directions: Iterable[Direction],
    kinds: Sequence[str],
    measure: Callable[[nn.Module], Mapping[str, float]],
    *,
    base: Mapping[str, float] | None = None,
    lower_is_better: Collection[str] = (),
    draws: int = 1,
    seed: int = 0,
    done: Iterable[Row] = (),
    on_row: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Apply each intervention to each direction, one at a time, and return a row for each, in that order.

    A row has `module`, `layer`, `type` (the last part of the module's name), `index`, `rank`, `sigma`, `relative`; the
    intervention's `kind`, the number of the noise's `draw`, its `factor`; and `drop`, for each metric how much worse it
    became, None if the model gave no finite number.

    Args:
        model: a bare model; it is left as it was, bit for bit, also after an error.
        directions: of `directions_of`.
        kinds: zero, flip, noise_S.
        measure: called with the intervened model, returns named scores. The drop is base − intervened; for the metrics
            in `lower_is_better` (a KL divergence) it is intervened − base: a positive drop is always a loss.
        base: the scores of the model without intervention, if they are known.
        lower_is_better: names of metrics.
        draws: how often noise is drawn for each direction. A draw depends on `seed`, module, index and its number
            alone: noises of two scales are the same but for the scale.
        seed: of the noise.
        done: rows of an interrupted probe, which are not measured again.
        on_row: called with each new row.

    Raises:
        ConfigError: an intervention is unknown or named twice, or a direction does not fit the model.
        DataError: `measure` gives other metrics than for the base, or a base score is not finite.
    """
    if len(set(kinds)) < len(kinds):
        raise ConfigError(f"interventions {', '.join(kinds)}: one is named twice; name each once")
    kept = {_key(row): row for row in done}
    scores = dict(measure(model) if base is None else base)
    if bad := [name for name, value in scores.items() if not math.isfinite(value)]:
        raise DataError(f"metric {bad[0]} of the base model is {scores[bad[0]]}; expected a finite number")
    rows = []
    for direction in directions:
        for kind in kinds:
            for draw in range(draws if kind.startswith("noise") else 1):
                entropy = [seed, zlib.crc32(direction.module.encode()), direction.index, draw]
                factor = float(intervention_factor(kind, np.random.default_rng(entropy).standard_normal()))
                row = {
                    "module": direction.module,
                    "layer": layer_of(direction.module),
                    "type": direction.module.rpartition(".")[2],
                    **{name: getattr(direction, name) for name in ("index", "rank", "sigma", "relative")},
                    "kind": kind,
                    "draw": draw,
                    "factor": factor,
                }
                if (key := _key(row)) not in kept:
                    with intervened(model, direction, factor):
                        found = measure(model)
                    kept[key] = {**row, "drop": _drop(scores, found, lower_is_better)}
                    if on_row is not None:
                        on_row(kept[key])
                rows.append(kept[key])
    return rows


def _key(row: Row) -> tuple:
    return row["module"], row["index"], row["kind"], row["draw"]


def _drop(
    base: Mapping[str, float], found: Mapping[str, float], lower_is_better: Collection[str]
) -> dict[str, float | None]:
    if set(base) != set(found):
        raise DataError(f"measured {', '.join(sorted(found))}; expected the base's {', '.join(sorted(base))}")
    losses = {name: (found[name] - base[name]) * (1 if name in lower_is_better else -1) for name in base}
    return {name: float(loss) if math.isfinite(loss) else None for name, loss in losses.items()}
