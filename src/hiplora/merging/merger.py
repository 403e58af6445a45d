"""Merge adapters that change the same base model."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, overload

import torch

from hiplora.adapters import AdapterUpdate, Channels, ExportReport, Pair, read_update, save_as_lora
from hiplora.errors import AdapterError, ConfigError
from hiplora.merging.compatible import check_compatible, merged_config
from hiplora.merging.dense_merge import DenseMerge
from hiplora.merging.options import check_count, is_number
from hiplora.merging.registry import Rule, rule
from hiplora.merging.term import Term
from hiplora.merging.truncation import truncate
from hiplora.spectral import full_precision

Adapter = str | os.PathLike | AdapterUpdate
Wrap = Callable[[Iterable[str]], Iterable[str]]
_NO_WRAP: Wrap = iter


@overload
def merge(
    adapter_dirs: Sequence[Adapter],
    method: Literal["addition"] = "addition",
    weights: Sequence[float] | None = None,
    *,
    base: str | None = None,
    rank: int | None = None,
    keep_channels: bool = False,
    options: Mapping[str, Any] | None = None,
    wrap: Wrap = _NO_WRAP,
) -> AdapterUpdate: ...


@overload
def merge(
    adapter_dirs: Sequence[Adapter],
    method: str,
    weights: Sequence[float] | None = None,
    *,
    base: str | None = None,
    rank: int | None = None,
    keep_channels: bool = False,
    options: Mapping[str, Any] | None = None,
    wrap: Wrap = _NO_WRAP,
) -> AdapterUpdate | DenseMerge: ...


def merge(
    adapter_dirs: Sequence[Adapter],
    method: str = "addition",
    weights: Sequence[float] | None = None,
    *,
    base: str | None = None,
    rank: int | None = None,
    keep_channels: bool = False,
    options: Mapping[str, Any] | None = None,
    wrap: Wrap = _NO_WRAP,
) -> AdapterUpdate | DenseMerge:
    """Merge adapters of one base model into one update.

    HiP-LoRA, Proj-LoRA, LoRA and AdaLoRA adapters of any ranks, scalings and targets go together; a module that an
    adapter does not adapt gets nothing from it. An adapter of weight 0 takes no part, unless all have weight 0.

    Args:
        adapter_dirs: adapter folders or updates, at least one.
        method: name of a rule in `RULES`.
        weights: one finite number per adapter, negative ones included; 1 each if None.
        base: base model, path or name, that all adapters are taken to be for; the fingerprints in them are then
            compared with its weights. None requires that they name the same one, or agree on fingerprints.
        rank: cut every module of the result down to this rank, by truncated SVD; None keeps it exact.
        keep_channels: with `rank`, of HiP-LoRA modules that share a basis cut the residual channel only.
        options: of the rule, by name.
        wrap: called with module names, yields them; for a progress bar.

    Returns:
        an update in thin factors (with `rank`, a `TruncatedUpdate` that knows its errors); for a rule of kind "dense"
        and without `rank`, a `DenseMerge`, which computes each module's update when it is asked for.

    Raises:
        AdapterError: an adapter cannot be read, leaks, replaces whole modules, or is for another base model.
        ConfigError: unknown rule or option, no adapters, or a weight, an option or the rank makes no sense.
    """
    chosen = rule(method)
    settings = chosen.make_options(options)
    if rank is not None:
        check_count("rank", rank, least=1)
    numbers = _check_weights(weights, len(adapter_dirs))
    updates = [read_update(adapter, base) for adapter in adapter_dirs]
    for update in updates:
        update.check_leak()
    check_compatible(updates, base)
    source = f"{method} of " + ", ".join(f"{w:g} × {u.source}" for w, u in zip(numbers, updates, strict=True))
    found = _Merge(chosen, settings, *_taking_part(updates, numbers), base or updates[0].base, source)
    if chosen.kind == "dense":
        dense = found.dense()
        return dense if rank is None else dense.truncated(rank, wrap=wrap)
    exact = found.factors(wrap)
    return exact if rank is None else truncate(exact, rank, keep_channels=keep_channels, wrap=wrap)


class _Merge:
    """Adapters that take part in a merge, all checked, with their weights."""

    def __init__(
        self,
        chosen: Rule,
        options: Any,
        updates: Sequence[AdapterUpdate],
        weights: Sequence[float],
        base: str,
        source: str,
    ):
        self._rule, self._options, self._updates, self._weights = chosen, options, updates, weights
        self._modules = sorted({module for update in updates for module in update.factors})
        self._shared: dict[str, Any] = {
            "base": base,
            "config": merged_config(updates),
            "fingerprints": {module: value for u in updates for module, value in u.fingerprints.items()},
            "extras": updates[0].extras if len(updates) == 1 else {},
            "source": source,
        }

    def factors(self, wrap: Wrap) -> AdapterUpdate:
        factors: dict[str, Pair] = {}
        channels: dict[str, Channels] = {}
        with full_precision(torch.device("cpu")):
            for module in wrap(self._modules):
                factors[module], kept = self._rule.combine(self._terms(module), self._options)
                if kept is not None:
                    channels[module] = kept
        return AdapterUpdate(kind="merged", factors=factors, channels=channels, **self._shared)

    def dense(self) -> DenseMerge:
        terms = {module: self._terms(module) for module in self._modules}
        return DenseMerge(terms=terms, rule=self._rule, options=self._options, **self._shared)

    def _terms(self, module: str) -> list[Term]:
        return [
            Term(update.factors[module], weight, update.channels.get(module))
            for update, weight in zip(self._updates, self._weights, strict=True)
            if module in update.factors
        ]


def save_merged(
    update: AdapterUpdate | DenseMerge, path: str | os.PathLike, *, overwrite: bool = False, **options: Any
) -> ExportReport:
    """Write a merged update as a plain LoRA folder, verified as any export.

    Args:
        update: what `merge` returned.
        path: output folder.
        overwrite: replace `path` if it exists.
        options: as for `hiplora.adapters.save_as_lora`: pad_rank, dtype, tolerance.

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


def _taking_part(
    updates: Sequence[AdapterUpdate], weights: Sequence[float]
) -> tuple[list[AdapterUpdate], list[float]]:
    kept = [(update, weight) for update, weight in zip(updates, weights, strict=True) if weight]
    kept = kept or list(zip(updates, weights, strict=True))
    return [update for update, _ in kept], [weight for _, weight in kept]
