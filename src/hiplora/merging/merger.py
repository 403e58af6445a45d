"""Merge adapters that change the same base model."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hiplora.adapters import AdapterUpdate, BaseWeights, Pair, product_norm, read_update
from hiplora.adapters.base import is_quantised
from hiplora.adapters.update import KEPT, balanced, zero_pair
from hiplora.errors import AdapterError, ConfigError
from hiplora.merging.rules import RULES, DenseTerm, Rule, Term, find_rule, is_count, is_number
from hiplora.merging.thin import thin_svd
from hiplora.spectral import full_precision, truncated_svd, weight_fingerprint

_CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class DenseMerge(AdapterUpdate):
    """The update of a merge by a dense rule, of full rank: it has no thin factors.

    It holds only the adapters' factors (`terms`, by module); all updates together would be a second model.
    """

    terms: Mapping[str, Sequence[Term]] = field(default_factory=dict)
    rule: Rule = RULES["ties"]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules that the merge changes."""
        return tuple(self.terms)

    def shape(self, module: str) -> tuple[int, int]:
        """Return (m, n) of a module's update: outputs, inputs."""
        A, B = self.terms[module][0].factors
        return B.shape[0], A.shape[1]

    def scaled(self, scale: float) -> "DenseMerge":
        """Return the merge times a number above 0: of every rule, that of adapters with weights times it."""
        super().scaled(scale)
        terms = {m: [replace(term, weight=scale * term.weight) for term in parts] for m, parts in self.terms.items()}
        return replace(self, terms=terms)

    def delta(self, module: str) -> Tensor:
        """Compute the merged update (m, n) of a module in fp32, in the memory of one matrix per adapter."""
        with full_precision(_CPU):
            dense = []
            for term in self.terms[module]:
                A, B = term.factors
                key = f"{module} {weight_fingerprint(A)} {weight_fingerprint(B)}"
                dense.append(DenseTerm(B @ A, term.weight, key))
            return self.rule.combine(dense, **self.options)


def merge(
    adapter_dirs: Sequence[str | os.PathLike | AdapterUpdate],
    method: str = "addition",
    weights: Sequence[float] | None = None,
    *,
    base: str | None = None,
    rank: int | None = None,
    keep_channels: bool = False,
    options: Mapping[str, Any] | None = None,
) -> AdapterUpdate:
    """Merge adapters of one base model into one update.

    Adapters of any methods, ranks, scalings and targets go together; a module that an adapter does not adapt gets
    nothing from it. An adapter of weight 0 takes no part, unless all have weight 0.

    Args:
        adapter_dirs: adapter folders or updates, at least one.
        method: name of a rule in `RULES`.
        weights: one finite number per adapter, negative ones included; 1 each if None.
        base: base model, path or name, that all adapters are taken to be for; their fingerprints are then compared
            with its weights. None requires that they name the same one, or agree on fingerprints.
        rank: cut every module of the result down to this rank, by truncated SVD; None keeps it exact.
        keep_channels: with `rank`, cut only the residual channel of HiP-LoRA modules that share a basis.
        options: of the rule, by name.

    Returns:
        an `AdapterUpdate` in thin factors (with `rank`, its `errors` say what was lost); for a rule of kind "dense"
        without `rank`, a `DenseMerge`, which computes each module's update on request.

    Raises:
        AdapterError: an adapter cannot be read, leaks, replaces whole modules, or is for another base model.
        ConfigError: a rule, option, weight or rank that makes no sense, or no adapters.
    """
    rule = find_rule(method)
    settings = rule.options(options)
    if rank is not None and not is_count(rank, least=1):
        raise ConfigError(f"rank is {rank!r}; expected a whole number of 1 or more")
    numbers = check_weights(weights, len(adapter_dirs))
    updates = [read_update(adapter, base) for adapter in adapter_dirs]
    for update in updates:
        update.check_leak()
    _check_compatible(updates, base)
    pairs = list(zip(updates, numbers, strict=True))
    weighted = [(update, weight) for update, weight in pairs if weight] or pairs
    if len(weighted) == 1 and (weight := weighted[0][1]) != 1:
        weighted[0][0].refuse_extras(f"scaled; its weight is {weight:g}, give it 1")
    shared: dict[str, Any] = {
        "base": base or updates[0].base,
        "kind": "merged",
        "config": _merged_config([update for update, _ in weighted]),
        "fingerprints": {module: value for update, _ in weighted for module, value in update.fingerprints.items()},
        "extras": weighted[0][0].extras if len(weighted) == 1 else {},
        "source": f"{method} of " + ", ".join(f"{weight:g} × {update.source}" for update, weight in pairs),
    }
    terms: dict[str, list[Term]] = {}
    for module in sorted({module for update, _ in weighted for module in update.factors}):
        terms[module] = [
            Term(update.factors[module], weight, update.channels.get(module))
            for update, weight in weighted
            if module in update.factors
        ]
    if rule.kind == "dense":
        dense = DenseMerge(factors={}, terms=terms, rule=rule, options=settings, **shared)
        return dense if rank is None else _cut_dense(dense, rank, shared)
    factors, channels = {}, {}
    with full_precision(_CPU):
        for module in tqdm(terms, "merging modules", disable=None, delay=2):
            factors[module], merged_channels = rule.combine(terms[module], **settings)
            if merged_channels is not None:
                channels[module] = merged_channels
    exact = AdapterUpdate(factors=factors, channels=channels, **shared)
    return exact if rank is None else truncate(exact, rank, keep_channels)


def truncate(update: AdapterUpdate, rank: int, keep_channels: bool = False) -> AdapterUpdate:
    """Cut every module of an update down to its `rank` strongest singular directions (Eckart and Young 1936).

    With `keep_channels`, a module with two channels keeps its gains, and only its residual channel is cut. The
    result's `errors` say what each module lost.
    """
    factors, channels, errors = dict(update.factors), dict(update.channels), {}
    with full_precision(_CPU):
        for module, (A, B) in update.factors.items():
            separate = channels.get(module) if keep_channels else None
            if separate is not None:
                (A_cut, B_cut), lost = _cut((separate.A, separate.B), rank)
                lost *= abs(separate.scaling)
                channels[module] = replace(separate, A=A_cut, B=B_cut)
                factors[module] = channels[module].factors()
            else:
                factors[module], lost = _cut((A, B), rank)
                if A.shape[0] > rank:
                    channels.pop(module, None)
            errors[module] = lost / product_norm(B, A) if lost else 0.0
    return replace(update, factors=factors, channels=channels, errors=errors)


def _cut(factors: Pair, rank: int) -> tuple[Pair, float]:
    """Return factors of at most this rank, and the norm of what was cut off."""
    if factors[0].shape[0] <= rank:
        return factors, 0.0
    U, sigma, V = thin_svd(factors)
    return balanced(U[:, :rank], sigma[:rank], V[:, :rank]), sigma[rank:].norm().item()


def _cut_dense(merged: DenseMerge, rank: int, shared: Mapping[str, Any]) -> AdapterUpdate:
    """Return the merge as a low-rank update: every module's certified truncated SVD, with its error."""
    factors, errors = {}, {}
    for module in tqdm(merged.modules, "merging modules", disable=None, delay=2):
        delta = merged.delta(module)
        with full_precision(_CPU):
            norm = torch.linalg.vector_norm(delta).item()
            if not norm:
                factors[module], errors[module] = zero_pair(*delta.shape), 0.0
                continue
            svd = truncated_svd(delta, min(rank, *delta.shape), name=module, fingerprint="none")
            A, B = factors[module] = balanced(svd.U, svd.sigma, svd.V)
            errors[module] = torch.linalg.vector_norm(delta.addmm_(B, A, alpha=-1)).item() / norm
    return AdapterUpdate(factors=factors, errors=errors, **shared)


def check_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return a finite weight for each of `count` adapters, 1 each if none are given; ConfigError if they do not fit."""
    if count == 0:
        raise ConfigError("nothing to merge: pass at least one adapter")
    weights = [1.0] * count if weights is None else weights
    if len(weights) != count:
        raise ConfigError(f"weights: {len(weights)} given for {count} adapters; pass one each")
    if wrong := [weight for weight in weights if not is_number(weight)]:
        raise ConfigError(f"weights: {wrong[0]!r} is not a finite number")
    return [float(weight) for weight in weights]


def _check_compatible(updates: Sequence[AdapterUpdate], base: str | None) -> None:
    """Check that adapters change the same base weights and that none of several replaces whole modules.

    With `base`, every adapter is compared with that model's weights; else with each other, by shapes, fingerprints
    and, where they share none, the names of their base models.
    """
    for update in updates if len(updates) > 1 else ():
        update.refuse_extras("merged with another adapter; train it without modules_to_save")
    if base is not None:
        weights = BaseWeights.of(replace(updates[0], base=base))
        for update in updates:
            for module in update.factors:
                weights.weight(module, update)
        return
    seen: dict[tuple[str, str], tuple[Any, AdapterUpdate]] = {}
    for update in updates:
        shares_fingerprint = any((module, "fingerprint") in seen for module in update.fingerprints)
        facts: dict[tuple[str, str], Any] = {(module, "shape"): update.shape(module) for module in update.factors}
        facts |= {(module, "fingerprint"): value for module, value in update.fingerprints.items()}
        for (module, fact), value in facts.items():
            first_value, first = seen.setdefault((module, fact), (value, update))
            if first_value != value:
                bases = [
                    " in ".join(filter(None, (one.base or "?", one.config.get("base_precision"))))
                    for one in (first, update)
                ]
                raise AdapterError(
                    f"layer {module}: {first.source} and {update.source} were made for different base weights (of "
                    f"{' and '.join(bases)}); only adapters of one base model, in one precision, can be merged"
                )
        if update is not updates[0] and not shares_fingerprint and _base_name(update) != _base_name(updates[0]):
            raise AdapterError(
                f"{updates[0].source} is for base model {_base_name(updates[0])}, {update.source} for "
                f"{_base_name(update)}; if these are the same model, name it: pass base=… (--base)"
            )


def _base_name(update: AdapterUpdate) -> str:
    """Return the name and revision of an update's base model; spellings of one folder give one name."""
    base, revision = update.base or "unknown", update.config.get("revision")
    name = str(Path(base).resolve()) if Path(base).exists() else base
    return f"{name}, revision {revision}" if revision not in (None, "main") else name


def _merged_config(updates: Sequence[AdapterUpdate]) -> dict[str, Any]:
    """Return the part of the adapters' configurations that holds for the merged one."""
    first = updates[0].config
    precisions = [update.config.get("base_precision") or "" for update in updates]
    config = {"peft_type": "LORA", **{key: first.get(key) for key in KEPT}}
    config["base_precision"] = max(precisions, key=is_quantised)  # the first, if none is
    channelled = [update.config for update in updates if update.channels]
    if channelled:
        bases = {one.get("basis", "weight") for one in channelled}
        config["basis"] = bases.pop() if len(bases) == 1 else "activation"
        calibration = channelled[0].get("calibration") or {}
        config["calibration"] = calibration if all(one.get("calibration") == calibration for one in channelled) else {}
    return config
