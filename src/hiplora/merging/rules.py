"""The merge rules: each a decorated function over one module's updates; its keyword arguments are its options.

torch is imported inside the rules, so that `hiplora merge --help` can list them without it.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hiplora.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from hiplora.adapters import Channels, Pair

RULES: dict[str, Rule] = {}
_CHUNK = 1 << 22  # entries of a matrix whose float64 copies are in memory at a time


@dataclass(frozen=True, eq=False)
class Term:
    """One adapter's update of one module, `weight · B'A'`; `channels` are the two of a HiP-LoRA module."""

    factors: Pair
    weight: float = 1.0
    channels: Channels | None = None


@dataclass(frozen=True, eq=False)
class DenseTerm:
    """One adapter's update of one module as a matrix `delta` (m, n), which a rule may overwrite.

    `key` depends on the module and the values alone: rules that draw at random seed with it.
    """

    delta: Tensor
    weight: float = 1.0
    key: str = ""


@dataclass(frozen=True)
class Rule:
    """A merge rule: `combine(terms, **options)`, by what it works on.

    Of kind "factors", it takes a sequence of `Term` and returns merged factors and, where it keeps the two channels of
    HiP-LoRA separate, those too (else None). "dense": it takes a sequence of `DenseTerm` and returns the merged matrix
    (m, n).
    """

    name: str
    summary: str
    kind: Literal["factors", "dense"]
    source: str
    combine: Callable[..., Any]

    @property
    def defaults(self) -> dict[str, Any]:
        """Its options by name, with their defaults."""
        parameters = inspect.signature(self.combine).parameters.values()
        return {option.name: option.default for option in parameters if option.kind is option.KEYWORD_ONLY}

    def options(self, values: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return all its options, some with these values; ConfigError if a name is not known or a value is wrong."""
        values = values or {}
        for name, value in values.items():
            if name not in self.defaults:
                known = ", ".join(self.defaults) or "none"
                raise ConfigError(f"merge rule {self.name!r} has no option {name!r}; its options: {known}")
            accepts, expected = _VALUES[name]
            if not accepts(value) and not (value is None and self.defaults[name] is None):
                raise ConfigError(f"{name} is {value!r}; expected {expected}")
        return self.defaults | dict(values)


def find_rule(name: str) -> Rule:
    """Return a rule by name; ConfigError if no rule has it."""
    if name not in RULES:
        raise ConfigError(f"merge rule {name!r} is not known; expected one of {', '.join(RULES)}")
    return RULES[name]


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number (a bool is not)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: Any, least: int = 0) -> bool:
    """Return whether a value is a whole number of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_share(value: Any) -> bool:
    return is_number(value) and 0 < value <= 1


# Option name -> (check, what is expected); every rule's options are among these.
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "density": (_is_share, "a number above 0 and up to 1"),
    "sv_reduction": (_is_share, "a number above 0 and up to 1"),
    "scale": (is_number, "a finite number"),
    "rescale": (lambda value: isinstance(value, bool), "true or false"),
    "seed": (is_count, "a whole number of 0 or more"),
}


def merge_rule(name: str, kind: Literal["factors", "dense"], source: str) -> Callable[[Any], Any]:
    """Register a function as a merge rule; the first line of its docstring is its summary."""

    def register(function: Any) -> Any:
        summary = inspect.getdoc(function) or ""
        RULES[name] = Rule(name, summary.partition("\n")[0].rstrip("."), kind, source, function)
        return function

    return register


@merge_rule("addition", "factors", "Ilharco et al. 2023, Editing models with task arithmetic")
def addition(terms: Sequence[Term]) -> tuple[Pair, Channels | None]:
    """The weighted sum of the updates, exact: gains added in a shared basis, everything else concatenated.

    HiP-LoRA terms with bit-equal U and V share their gains, `δ = Σ w_t δ_t`, so that two adapters of rank r + k make
    one of rank 2r + k. Channels are returned where all terms share one basis. Terms of weight 0 are left out; if all
    are, the result is a zero update of the first term's rank.
    """
    import torch

    groups: list[list[Term]] = []
    for term in [term for term in terms if term.weight != 0] or terms[:1]:
        group = next((group for group in groups if _share_basis(group[0], term)), None)
        if group is None:
            groups.append([term])
        else:
            group.append(term)
    pairs, channels = [], None
    for group in groups:
        if group[0].channels is not None:
            channels = _add_channels(group)
            pairs.append(channels.factors())
        else:
            A, B = group[0].factors
            pairs.append((A, group[0].weight * B))
    factors = torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs], dim=1)
    return factors, channels if len(groups) == 1 else None


def _share_basis(first: Term, second: Term) -> bool:
    """Return whether two terms' gains belong to the same directions, bit for bit.

    Two decompositions of one weight may rotate directions inside a cluster of equal singular values.
    """
    a, b = first.channels, second.channels
    return a is not None and b is not None and a.sides == b.sides and a.U.equal(b.U) and a.V.equal(b.V)


def _add_channels(group: Sequence[Term]) -> Channels:
    from dataclasses import replace

    import torch

    parts = [(term.weight, term.channels) for term in group if term.channels is not None]
    gains = [weight * channels.delta for weight, channels in parts if channels.delta is not None]
    limits = [channels.leak_limit for _, channels in parts]
    return replace(
        parts[0][1],
        A=torch.cat([channels.A for _, channels in parts]),
        B=torch.cat([weight * channels.scaling * channels.B for weight, channels in parts], dim=1),
        delta=torch.stack(gains).sum(dim=0) if gains else None,
        scaling=1.0,
        leak_limit=None if None in limits else max(limit for limit in limits if limit is not None),
    )


@merge_rule("knots", "factors", "Stoica et al. 2024, Model merging with SVD to tie the KnOTS")
def knots(terms: Sequence[Term], *, density: float = 0.2, scale: float = 1.0) -> tuple[Pair, None]:
    """TIES among the updates' coordinates in output directions that they share.

    With `[ΔW_1 … ΔW_T] = U Σ [V_1ᵀ … V_Tᵀ]`, the result is `U · TIES(Σ V_1ᵀ, …, Σ V_Tᵀ)`, of a rank of their ranks' sum
    at most. `density` is the share of each module's coordinates that is kept.
    """
    from hiplora.adapters.update import zero_pair
    from hiplora.merging.thin import shared_outputs

    A, B = terms[0].factors
    U = shared_outputs([term.factors for term in terms])
    if not U.shape[1]:
        return zero_pair(B.shape[0], A.shape[1]), None
    aligned = []
    for term in terms:
        A, B = term.factors
        aligned.append(DenseTerm(((U.T @ B.double()) @ A.double()).float(), term.weight))
    return (ties(aligned, density=density, scale=scale), U.float()), None


@merge_rule("tsv", "factors", "Gargiulo et al. 2025, Task Singular Vectors")
def tsv(terms: Sequence[Term], *, sv_reduction: float | None = None, scale: float = 1.0) -> tuple[Pair, None]:
    """The singular triplets of all updates, their directions made orthogonal to each other.

    `ΔW = Û diag(w_1 σ_1, …, w_T σ_T) V̂ᵀ` with the orthogonal polar factors `Û` and `V̂` of the updates' left and right
    singular vectors side by side. `sv_reduction` is the share of each update's triplets that is kept, rounded up; None
    is the paper's rule, a T-th of min(out, in) for T updates.
    """
    import torch

    from hiplora.adapters.update import balanced
    from hiplora.merging.thin import polar, thin_svd

    parts = []
    for term in terms:
        U, sigma, V = thin_svd(term.factors)
        paper = max(1, min(U.shape[0], V.shape[0]) // len(terms))
        count = paper if sv_reduction is None else math.ceil(sv_reduction * len(sigma))
        parts.append((U[:, :count], scale * term.weight * sigma[:count], V[:, :count]))
    U, V = (polar(torch.cat([part[side] for part in parts], dim=1)) for side in (0, 2))
    return balanced(U, torch.cat([sigma for _, sigma, _ in parts]), V), None


@merge_rule("iso-c", "factors", "Marczak et al. 2025, No Task Left Behind")
def iso_c(terms: Sequence[Term], *, scale: float = 1.0) -> tuple[Pair, None]:
    """The directions of the weighted sum, all made equally strong.

    With `Σ_t w_t ΔW_t = U diag(σ) Vᵀ`, the result is `scale · σ̄ U Vᵀ`, `σ̄` the mean of the nonzero singular values.
    """
    import torch

    from hiplora.adapters.update import balanced
    from hiplora.merging.thin import thin_svd

    A = torch.cat([term.factors[0] for term in terms])
    B = torch.cat([term.weight * term.factors[1] for term in terms], dim=1)
    U, sigma, V = thin_svd((A, B))
    return balanced(U, scale * sigma.mean().expand_as(sigma), V), None


@merge_rule("ties", "dense", "Yadav et al. 2023, TIES-Merging")
def ties(terms: Iterable[DenseTerm], *, density: float = 0.2, scale: float = 1.0) -> Tensor:
    """The largest entries of each update; where signs differ, the mean of those that agree with their sum.

    Of each entry, the sign of the sum of the trimmed updates is elected (of a zero sum, plus), and
    `scale · Σ_agreeing w_t τ_t / #agreeing` is the result: weights scale what is averaged, not the vote, as in PEFT.
    """
    import torch
    from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge

    terms = list(terms)
    trimmed = [keep_largest_(term.delta, density) for term in terms]
    weights = torch.tensor([term.weight for term in terms], dtype=torch.float64).view(-1, 1, 1)
    merged = trimmed[0]
    step = max(1, _CHUNK // merged.shape[1])
    for rows in (slice(start, start + step) for start in range(0, len(merged), step)):
        # In float64 the sum of a few fp32 numbers has its true sign, whatever their order.
        stacked = torch.stack([delta[rows] for delta in trimmed]).double()
        agreeing = calculate_majority_sign_mask(stacked)
        merged[rows] = scale * disjoint_merge(stacked * weights, agreeing)
    return merged


@merge_rule("dare", "dense", "Yu et al. 2024, Language models are Super Mario")
def dare(terms: Iterable[DenseTerm], *, density: float = 0.5, rescale: bool = True, seed: int = 0) -> Tensor:
    """The weighted sum of entries drawn at random, scaled up for those that were dropped.

    `Σ_t w_t (M_t ⊙ ΔW_t) / density` with M_t drawn from {0, 1}. `density` is 1 minus the drop rate of the paper;
    without `rescale` nothing is divided. Each module of each adapter draws by `seed` and its own values alone.
    """
    import torch
    from peft.utils.merge_utils import prune

    def drop(term: DenseTerm) -> Tensor:
        digest = hashlib.blake2b(f"{seed} {term.key}".encode(), digest_size=7).digest()
        with torch.random.fork_rng(devices=[]):  # PEFT draws from the global generator
            torch.default_generator.manual_seed(int.from_bytes(digest))
            return prune(term.delta, density, method="random", rescale=rescale)

    return _weighted_sum_((term.delta if density == 1 else drop(term), term.weight) for term in terms)


@merge_rule("magnitude", "dense", "PEFT's magnitude_prune")
def magnitude(terms: Iterable[DenseTerm], *, density: float = 0.2) -> Tensor:
    """The weighted sum of the largest entries of each update."""
    return _weighted_sum_((keep_largest_(term.delta, density), term.weight) for term in terms)


def keep_largest_(delta: Tensor, density: float) -> Tensor:
    """Zero, in place, all but the ⌊density · mn⌋ largest entries of a matrix (and those as large as the last)."""
    if density >= 1:
        return delta
    count = int(density * delta.numel())
    if not count:
        return delta.zero_()
    size = delta.abs()
    threshold = size.flatten().kthvalue(size.numel() - count + 1).values
    return delta.masked_fill_(size < threshold, 0.0)


def _weighted_sum_(terms: Iterable[tuple[Tensor, float]]) -> Tensor:
    """Return `Σ w_t ΔW_t` in the memory of the first update; the others are overwritten, one at a time."""
    parts = (delta.mul_(weight) for delta, weight in terms)
    total = next(parts)
    for part in parts:
        total.add_(part)
    return total
