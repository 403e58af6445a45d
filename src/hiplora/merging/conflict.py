"""Where adapters that are merged meet: shared directions, cancelled norm and opposite signs, module by module."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import torch

from hiplora.adapters import AdapterUpdate, Pair
from hiplora.errors import AdapterError, ConfigError
from hiplora.merging.subspaces import (
    Overlap,
    Spaces,
    cancelled,
    compress,
    inner_product,
    norm_of_sum,
    overlap,
    spaces,
)
from hiplora.spectral import full_precision

_NO_WRAP: Callable[[Iterable[str]], Iterable[str]] = iter


@dataclass(frozen=True)
class PairConflict:
    """How the weighted updates of two adapters lie to each other in one module.

    `adapters` are their places in the merge, from 0. `left` compares what they write (column spaces, outputs), `right`
    what they read (row spaces, inputs), `cosine` is `⟨ΔW_a, ΔW_b⟩ / (‖ΔW_a‖ ‖ΔW_b‖)`. All are None where one of the two
    is zero.
    """

    adapters: tuple[int, int]
    left: Overlap | None
    right: Overlap | None
    cosine: float | None

    @property
    def score(self) -> float | None:
        """How much they conflict: `√(left · right) · (1 − cosine) / 2`, of the mean overlaps, from 0 to 1.

        Updates that write to or read from other directions do not meet: 0. Where they meet, what counts is whether
        they agree: 0 for the same update up to its size, 1/2 for unrelated ones, 1 for opposites.
        """
        if self.left is None or self.right is None or self.cosine is None:
            return None
        return math.sqrt(self.left.mean * self.right.mean) * (1 - self.cosine) / 2

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready record."""
        return {
            "adapters": list(self.adapters),
            "left": asdict(self.left) if self.left else None,
            "right": asdict(self.right) if self.right else None,
            "cosine": self.cosine,
            "score": self.score,
        }


@dataclass(frozen=True)
class ModuleConflict:
    """How the weighted updates `w_t ΔW_t` of one module, m outputs and n inputs, go together.

    `adapters` are the places in the merge of those that adapt it, from 0, and `ranks` and `norms` (Frobenius) are
    theirs. `sum_norm` is `‖Σ_t w_t ΔW_t‖_F`. `magnitude` is `Σ_t ‖w_t ΔW_t‖₁`, `cancelled` what of it the sum loses to
    opposite signs. `pairs` are those of `adapters`.
    """

    module: str
    outputs: int
    inputs: int
    adapters: tuple[int, ...]
    ranks: tuple[int, ...]
    norms: tuple[float, ...]
    sum_norm: float
    magnitude: float
    cancelled: float
    pairs: tuple[PairConflict, ...]

    @property
    def layer(self) -> int | None:
        """The first number in the module's name, or None."""
        found = re.search(r"\.(\d+)\.", f".{self.module}.")
        return int(found[1]) if found else None

    @property
    def norm_ratio(self) -> float | None:
        """The norm of the sum over the sum of the norms: 1 where all agree, 0 where all is lost; None of zeros."""
        total = sum(self.norms)
        return self.sum_norm / total if total else None

    @property
    def unrelated(self) -> float | None:
        """The norm ratio of orthogonal updates of these norms, `√(Σ‖·‖²) / Σ‖·‖`: 1/√T for T equal ones."""
        total = sum(self.norms)
        return math.hypot(*self.norms) / total if total else None

    @property
    def sign_conflict(self) -> float | None:
        """The share of the magnitude that meets its like of the other sign, 0 to 1; None of zeros.

        `1 − ‖Σ_t w_t ΔW_t‖₁ / Σ_t ‖w_t ΔW_t‖₁`; of unrelated updates with normal entries it is `1 − unrelated`.
        """
        return self.cancelled / self.magnitude if self.magnitude else None

    @property
    def worst(self) -> PairConflict | None:
        """The pair that conflicts most, or None where no two adapters change the module."""
        known = [pair for pair in self.pairs if pair.score is not None]
        return max(known, key=lambda pair: pair.score or 0.0, default=None)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready record, with `score` and `worst` (adapters) of the pair that conflicts most."""
        worst = self.worst
        return {
            "module": self.module,
            "layer": self.layer,
            "type": self.module.rpartition(".")[2],
            "outputs": self.outputs,
            "inputs": self.inputs,
            "adapters": list(self.adapters),
            "ranks": list(self.ranks),
            "norms": list(self.norms),
            "sum_norm": self.sum_norm,
            "norm_ratio": self.norm_ratio,
            "unrelated": self.unrelated,
            "magnitude": self.magnitude,
            "sign_conflict": self.sign_conflict,
            "pairs": [pair.to_json() for pair in self.pairs],
            "score": worst.score if worst else None,
            "worst": list(worst.adapters) if worst else None,
        }


def conflicts(
    updates: Sequence[AdapterUpdate],
    weights: Sequence[float],
    *,
    wrap: Callable[[Iterable[str]], Iterable[str]] = _NO_WRAP,
) -> list[ModuleConflict]:
    """Measure how the weighted updates of several adapters go together, in the model's order of modules.

    One row for each module that any adapter adapts, compared among those that do. Everything is measured on
    `w_t ΔW_t`: a negative weight turns a cosine's sign, a weight of 0 makes a zero update.

    Args:
        updates: the adapters' updates, at least one.
        weights: one finite number each.
        wrap: called with the module names, yields them; for a progress bar.

    Raises:
        ConfigError: no updates, or weights of the wrong number or not finite.
        AdapterError: two adapters have a module of that name in different shapes.
    """
    if not updates or len(updates) != len(weights):
        raise ConfigError(
            f"weights: {len(weights)} given for {len(updates)} adapters; pass one each, at least one"
        )
    if not all(map(math.isfinite, weights)):
        raise ConfigError(f"weights: {list(weights)} are not all finite numbers")
    modules = sorted({module for update in updates for module in update.factors}, key=_natural)
    return [_measure(module, updates, weights) for module in wrap(modules)]


def _measure(module: str, updates: Sequence[AdapterUpdate], weights: Sequence[float]) -> ModuleConflict:
    places = [place for place, update in enumerate(updates) if module in update.factors]
    outputs, inputs = _shape(module, [updates[place] for place in places])
    factors = [_weighted(updates[place].factors[module], weights[place]) for place in places]
    with full_precision(torch.device("cpu")):
        small = compress(factors)
        spans = [spaces(pair) for pair in small]
        lost, magnitude = cancelled(factors)
        return ModuleConflict(
            module=module,
            outputs=outputs,
            inputs=inputs,
            adapters=tuple(places),
            ranks=tuple(span.rank for span in spans),
            norms=tuple(span.norm for span in spans),
            sum_norm=norm_of_sum(small),
            magnitude=magnitude,
            cancelled=lost,
            pairs=tuple(
                _pair((places[i], places[j]), (small[i], small[j]), (spans[i], spans[j]), (outputs, inputs))
                for i, j in combinations(range(len(places)), 2)
            ),
        )


def _pair(
    places: tuple[int, int], factors: tuple[Pair, Pair], spans: tuple[Spaces, Spaces], shape: tuple[int, int]
) -> PairConflict:
    one, other = spans
    if not one.rank or not other.rank:
        return PairConflict(places, None, None, None)
    cosine = inner_product(*factors) / (one.norm * other.norm)
    return PairConflict(
        places,
        overlap(one.outputs, other.outputs, shape[0]),
        overlap(one.inputs, other.inputs, shape[1]),
        max(-1.0, min(1.0, cosine)),
    )


def _shape(module: str, updates: Sequence[AdapterUpdate]) -> tuple[int, int]:
    shapes = []
    for update in updates:
        A, B = update.factors[module]
        shapes.append((B.shape[0], A.shape[1]))
        if shapes[-1] != shapes[0]:
            raise AdapterError(
                f"layer {module}: {updates[0].source} has it with (outputs, inputs) {shapes[0]}, {update.source} "
                f"with {shapes[-1]}; only adapters of one base model can be compared"
            )
    return shapes[0]


def _weighted(pair: Pair, weight: float) -> Pair:
    A, B = pair
    return A.detach().float(), weight * B.detach().float()


def _natural(module: str) -> list[str | int]:
    """Sort key that puts layer 10 after layer 9."""
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"(\d+)", module))]
