"""Merge adapters that change the same base model."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hiplora.adapters import (
    SELECTION,
    AdapterUpdate,
    BaseWeights,
    Channels,
    ExportReport,
    Pair,
    product_norm,
    read_update,
    save_as_lora,
)
from hiplora.errors import AdapterError, ConfigError
from hiplora.merging.rules import DenseTerm, Rule, Term, find_rule, is_count, is_number
from hiplora.merging.thin import balanced, thin_svd, zero_pair
from hiplora.spectral import full_precision, truncated_svd, weight_fingerprint

Adapter = str | os.PathLike | AdapterUpdate
Wrap = Callable[[Iterable[str]], Iterable[str]]
_CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class TruncatedUpdate(AdapterUpdate):
    """An update that was cut down to rank `cut_to`; `errors` is ‖ΔW − ΔW_full‖/‖ΔW_full‖ (Frobenius) per module."""

    cut_to: int = 0
    errors: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready record of the truncation, the module that lost most first."""
        worst = sorted(self.errors.items(), key=lambda item: -item[1])
        return {"rank": self.cut_to, "modules": [{"module": m, "relative_error": e} for m, e in worst]}


@dataclass(frozen=True, eq=False)
class DenseMerge:
    """The update of a merge by a dense rule; its other attributes are those of an `AdapterUpdate`.

    Only the adapters' factors are held (`terms`, by module). `delta` computes the update of one module; all of them
    together would be a second model.
    """

    base: str
    config: Mapping[str, Any]
    terms: Mapping[str, Sequence[Term]]
    rule: Rule
    options: Mapping[str, Any]
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    source: str = "merge"
    kind: str = "merged"

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules that the merge changes."""
        return tuple(self.terms)

    def shape(self, module: str) -> tuple[int, int]:
        """Return (m, n) of a module's update: outputs, inputs."""
        A, B = self.terms[module][0].factors
        return B.shape[0], A.shape[1]

    def delta(self, module: str) -> Tensor:
        """Compute the merged update (m, n) of a module in fp32, in the memory of one matrix per adapter."""
        with full_precision(_CPU):
            dense = []
            for term in self.terms[module]:
                A, B = term.factors
                key = f"{module} {weight_fingerprint(A)} {weight_fingerprint(B)}"
                dense.append(DenseTerm(B @ A, term.weight, key))
            return self.rule.combine(dense, **self.options)

    def truncated(self, rank: int, *, wrap: Wrap = iter) -> TruncatedUpdate:
        """Return the merge as a low-rank update: every module's certified truncated SVD, with its error.

        Raises:
            ConfigError: rank below 1.
            FactorError: a decomposition missed its tolerance.
        """
        _check_rank(rank)
        factors, errors = {}, {}
        for module in wrap(list(self.modules)):
            delta = self.delta(module)
            with full_precision(_CPU):
                norm = torch.linalg.vector_norm(delta).item()
                if not norm:
                    factors[module], errors[module] = zero_pair(*delta.shape), 0.0
                    continue
                svd = truncated_svd(delta, min(rank, *delta.shape), name=module, fingerprint="none")
                A, B = factors[module] = balanced(svd.U, svd.sigma, svd.V)
                errors[module] = torch.linalg.vector_norm(delta.addmm_(B, A, alpha=-1)).item() / norm
        kept = {
            name: getattr(self, name)
            for name in ("base", "kind", "config", "fingerprints", "extras", "source")
        }
        return TruncatedUpdate(factors=factors, cut_to=rank, errors=errors, **kept)

    def check_leak(self) -> None:
        """Do nothing: the adapters were checked before the merge, and a dense update promises no complement."""


def merge(
    adapter_dirs: Sequence[Adapter],
    method: str = "addition",
    weights: Sequence[float] | None = None,
    *,
    base: str | None = None,
    rank: int | None = None,
    keep_channels: bool = False,
    options: Mapping[str, Any] | None = None,
    wrap: Wrap = iter,
) -> Any:
    """Merge adapters of one base model into one update.

    HiP-LoRA, LoRA and AdaLoRA adapters of any ranks, scalings and targets go together; a module that an adapter does
    not adapt gets nothing from it. An adapter of weight 0 takes no part, unless all have weight 0.

    Args:
        adapter_dirs: adapter folders or updates, at least one.
        method: name of a rule in `RULES`.
        weights: one finite number per adapter, negative ones included; 1 each if None.
        base: base model, path or name, that all adapters are taken to be for; their fingerprints are then compared
            with its weights. None requires that they name the same one, or agree on fingerprints.
        rank: cut every module of the result down to this rank, by truncated SVD; None keeps it exact.
        keep_channels: with `rank`, cut only the residual channel of HiP-LoRA modules that share a basis.
        options: of the rule, by name.
        wrap: called with module names, yields them; for a progress bar.

    Returns:
        an `AdapterUpdate` in thin factors (with `rank`, a `TruncatedUpdate` with its errors); for a rule of kind
        "dense" without `rank`, a `DenseMerge`, which computes each module's update on request.

    Raises:
        AdapterError: an adapter cannot be read, leaks, replaces whole modules, or is for another base model.
        ConfigError: unknown rule or option, no adapters, or a weight, an option or the rank is out of range.
    """
    rule = find_rule(method)
    settings = rule.options(options)
    if rank is not None:
        _check_rank(rank)
    numbers = _check_weights(weights, len(adapter_dirs))
    updates = [read_update(adapter, base) for adapter in adapter_dirs]
    for update in updates:
        update.check_leak()
    check_compatible(updates, base)
    pairs = list(zip(updates, numbers, strict=True))
    kept = [(update, weight) for update, weight in pairs if weight] or pairs
    shared: dict[str, Any] = {
        "base": base or updates[0].base,
        "config": _merged_config([update for update, _ in kept]),
        "fingerprints": {
            module: value for update, _ in kept for module, value in update.fingerprints.items()
        },
        "extras": kept[0][0].extras if len(kept) == 1 else {},
        "source": f"{method} of " + ", ".join(f"{weight:g} × {update.source}" for update, weight in pairs),
    }
    modules = sorted({module for update, _ in kept for module in update.factors})
    terms = {
        module: [
            Term(update.factors[module], weight, update.channels.get(module))
            for update, weight in kept
            if module in update.factors
        ]
        for module in modules
    }
    if rule.kind == "dense":
        dense = DenseMerge(terms=terms, rule=rule, options=settings, **shared)
        return dense if rank is None else dense.truncated(rank, wrap=wrap)
    factors: dict[str, Pair] = {}
    channels: dict[str, Channels] = {}
    with full_precision(_CPU):
        for module in wrap(modules):
            factors[module], found = rule.combine(terms[module], **settings)
            if found is not None:
                channels[module] = found
    exact = AdapterUpdate(kind="merged", factors=factors, channels=channels, **shared)
    return exact if rank is None else truncate(exact, rank, keep_channels=keep_channels, wrap=wrap)


def truncate(
    update: AdapterUpdate, rank: int, *, keep_channels: bool = False, wrap: Wrap = iter
) -> TruncatedUpdate:
    """Cut every module of an update down to its `rank` strongest singular directions (Eckart and Young 1936).

    In factor space: QR of both thin factors, SVD of the small matrix between them. Modules of no higher rank are left
    as they are. With `keep_channels`, a module that has its two channels apart keeps the gains, and only its residual
    channel is cut.

    Raises:
        ConfigError: rank below 1.
    """
    _check_rank(rank)
    factors, channels, errors = dict(update.factors), dict(update.channels), {}
    with full_precision(_CPU):
        for module in wrap(list(factors)):
            apart = channels.get(module) if keep_channels else None
            if apart is not None:
                (A, B), lost = _cut((apart.A, apart.B), rank)
                lost *= abs(apart.scaling)
                channels[module] = replace(apart, A=A, B=B)
                factors[module] = channels[module].factors()
            elif factors[module][0].shape[0] > rank:
                factors[module], lost = _cut(factors[module], rank)
                channels.pop(module, None)
            else:
                lost = 0.0
            A, B = update.factors[module]
            errors[module] = lost / product_norm(B, A) if lost else 0.0
    return TruncatedUpdate(
        **vars(update) | {"factors": factors, "channels": channels}, cut_to=rank, errors=errors
    )


def _cut(factors: Pair, rank: int) -> tuple[Pair, float]:
    """Return factors of at most this rank, and the norm of what was cut off."""
    if factors[0].shape[0] <= rank:
        return factors, 0.0
    U, sigma, V = thin_svd(factors)
    return balanced(U[:, :rank], sigma[:rank], V[:, :rank]), sigma[rank:].norm().item()


def save_merged(
    update: Any, path: str | os.PathLike, *, overwrite: bool = False, **options: Any
) -> ExportReport:
    """Write a merged update as a plain LoRA folder, verified as any export.

    `options` are those of `hiplora.adapters.save_as_lora`: pad_rank, dtype, tolerance.

    Raises:
        AdapterError: the update is of full rank, or as `hiplora.adapters.save_as_lora`.
        ConfigError: as `hiplora.adapters.save_as_lora`.
    """
    if isinstance(update, DenseMerge):
        raise AdapterError(
            f"{update.source}: the update is of full rank, which no LoRA adapter holds; cut it down with "
            "merge(..., rank=...), or write a model with hiplora.adapters.save_dense"
        )
    return save_as_lora(update, path, overwrite=overwrite, **options)


# Which adapters may be merged ----------------------------------------------------------------------------------


def check_compatible(updates: Sequence[AdapterUpdate], base: str | None) -> None:
    """Check that adapters change the same base weights and that none of several replaces whole modules.

    With `base`, every adapter is compared with that model's weights; else with each other, by shapes, fingerprints
    and, where they share none, the names of their base models.

    Raises:
        AdapterError: naming the adapters, the layer and the way out.
    """
    whole = [update for update in updates if update.extras]
    if whole and len(updates) > 1:
        raise AdapterError(
            f"{whole[0].source}: replaces whole modules ({', '.join(sorted(whole[0].extras))}), which cannot be "
            "merged with another adapter; train it without modules_to_save"
        )
    if base is not None:
        weights = BaseWeights(base)
        for update in updates:
            for module in update.factors:
                weights.fitting_weight(module, update)
        return
    shapes: dict[str, tuple[tuple[int, int], AdapterUpdate]] = {}
    prints: dict[str, tuple[str, AdapterUpdate]] = {}
    for update in updates:
        for module, (A, B) in update.factors.items():
            shape, other = shapes.setdefault(module, ((B.shape[0], A.shape[1]), update))
            if shape != (B.shape[0], A.shape[1]):
                raise AdapterError(_different(module, other, update))
        shares = any(module in prints for module in update.fingerprints)
        if update is not updates[0] and not shares and _name(update.base) != _name(updates[0].base):
            raise AdapterError(
                f"{updates[0].source} is for base model {updates[0].base or 'unknown'}, {update.source} for "
                f"{update.base or 'unknown'}; if these are the same model, name it: pass base=…"
            )
        for module, fingerprint in update.fingerprints.items():
            known, other = prints.setdefault(module, (fingerprint, update))
            if known != fingerprint:
                raise AdapterError(_different(module, other, update))


def _different(module: str, one: AdapterUpdate, other: AdapterUpdate) -> str:
    return (
        f"layer {module}: {one.source} and {other.source} were made for different base weights (of {one.base or '?'} "
        f"and {other.base or '?'}); only adapters of one base model can be merged"
    )


def _name(base: str) -> str:
    """Return a base model's name so that two spellings of one folder agree."""
    return str(Path(base).resolve()) if base and Path(base).exists() else base


def _merged_config(updates: Sequence[AdapterUpdate]) -> dict[str, Any]:
    """Return the part of the adapters' configurations that holds for the merged one."""
    first = updates[0].config
    config = {
        "peft_type": "LORA",
        "task_type": first.get("task_type"),
        "base_precision": first.get("base_precision"),
    }
    # Where all adapters select the same modules, so does the merged one; else it names them one by one.
    if all(_selection(update) == _selection(updates[0]) for update in updates):
        config |= {key: first.get(key) for key in SELECTION}
    ranks = {update.config.get("principal_rank") for update in updates}
    if len(ranks) == 1:
        config["principal_rank"] = ranks.pop()
    channelled = [update.config for update in updates if update.channels]
    bases = {one.get("basis", "weight") for one in channelled}
    alike = bool(channelled) and all(
        one.get("calibration") == channelled[0].get("calibration") for one in channelled
    )
    config["basis"] = bases.pop() if len(bases) == 1 else ("activation" if bases else "weight")
    config["calibration"] = (channelled[0].get("calibration") if alike else None) or {}
    if len(updates) == 1:
        config |= {key: first.get(key) for key in ("modules_to_save", "auto_mapping", "revision")}
    return config


def _selection(update: AdapterUpdate) -> list[Any]:
    values = (update.config.get(key) for key in SELECTION)
    return [sorted(value) if isinstance(value, (list, set)) else value for value in values]


def _check_rank(rank: Any) -> None:
    if not is_count(rank, least=1):
        raise ConfigError(f"rank is {rank!r}; expected a whole number of 1 or more")


def _check_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if count == 0:
        raise ConfigError("nothing to merge: pass at least one adapter")
    if weights is None:
        return [1.0] * count
    if len(weights) != count:
        raise ConfigError(f"weights: {len(weights)} given for {count} adapters; pass one each")
    for weight in weights:
        if not is_number(weight):
            raise ConfigError(f"weights: {weight!r} is not a finite number")
    return [float(weight) for weight in weights]
