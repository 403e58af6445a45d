"""How many directions to protect in a layer: a number, a share of its rank, or a share of its energy."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hiplora.spectral.factors import widest
from hiplora.spectral.svd import as_matrix

RankSpec = int | float | str
EXPECTED_RANK = "an integer of at least 1, a fraction in (0, 1), or 'energy:x' with x in (0, 1)"
_ENERGY = "energy:"


def is_rank(spec: Any) -> bool:
    """Whether a value says how many directions to protect (`resolve_rank`)."""
    if isinstance(spec, bool):
        return False
    if isinstance(spec, int):
        return spec >= 1
    if isinstance(spec, float):
        return 0 < spec < 1
    return isinstance(spec, str) and spec.startswith(_ENERGY) and 0 < _share(spec) < 1


def parse_rank(text: str) -> RankSpec:
    """Read a rank as a user types it: `32`, `0.1` or `energy:0.95`; any other text is returned unchanged."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def resolve_rank(
    spec: RankSpec, shape: tuple[int, int], energies: Callable[[], Float[Tensor, " q"]], capped: bool = True
) -> int:
    """Return k for a weight of shape (m, n).

    An integer is taken as it is; a fraction is one of min(m, n), rounded, at least 1; "energy:x" is the smallest k
    whose directions hold the share x of the sum of `energies()`, which descend (eigenvalues of the inputs' second
    moment, or σ² of the weight), `capped` at half of min(m, n) where there must be a complement to learn in.
    """
    limit = min(shape)
    if isinstance(spec, int):
        return spec
    if isinstance(spec, float):
        return min(max(round(spec * limit), 1), limit)
    k = rank_for_energy(energies(), _share(spec))
    return min(k, max(limit // 2, 1)) if capped else k


def rank_for_energy(energies: Float[Tensor, " q"], share: float) -> int:
    """Return the smallest k whose leading `energies` hold this share of their sum; 1 where all are zero."""
    total = energies.sum()
    if total == 0:
        return 1
    reached = (energies.cumsum(0) / total) >= share - 1e-12
    return int(reached.int().argmax()) + 1 if reached.any() else len(energies)


def squared_singular_values(weight: Float[Tensor, "m n"], name: str = "weight") -> Float[Tensor, " q"]:
    """Return all σ² of a weight, descending, in float64 (fp32 where the device has none); errors as `as_matrix`."""
    upcast = as_matrix(weight, 1, name).to(widest(weight.device))
    flat = upcast if upcast.shape[0] <= upcast.shape[1] else upcast.T
    return torch.linalg.eigvalsh(flat @ flat.T).flip(0).clamp_min(0.0)


def _share(spec: str) -> float:
    try:
        return float(spec.removeprefix(_ENERGY))
    except ValueError:
        return 0.0
