"""Calibrate a model on text or a loop, and compute factors from it; in the weight basis, from the weights alone."""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from hiplora.errors import ConfigError
from hiplora.positions import position_limit
from hiplora.spectral import (
    FactorStore,
    MomentBasis,
    SpectralFactors,
    activation_factors,
    resolve_rank,
    squared_singular_values,
    weight_fingerprint,
)
from hiplora.tuner.config import HipLoraConfig
from hiplora.tuner.experts import shared_side, unrolled
from hiplora.tuner.moments import Bases, measure_inputs, measure_outputs
from hiplora.tuner.sampling import OWN_DATA, CalibrationStore, model_fingerprint, sampled_rows
from hiplora.tuner.targets import Target, find_targets, frozen_weight, measured_target

Rows = Sequence[Sequence[int] | Tensor] | Tensor | None
GRADIENT_TOKENS = 4096  # of the text, that the output side is measured on, at three times the cost a token
SELF = "self"  # the source: text sampled from the model itself
TOKENS_PER_INPUT = 2  # fewer tokens than this many times the width give a noisy moment


@dataclass(frozen=True)
class Calibration:
    """The protected directions of a model's layers, and what they were measured on.

    `source` is "self", or describes the text; `tokens` were seen by each layer; `key` identifies model and text. A row
    of `layers` has name, shape, k, effective_rank of the inputs, and energy, the share of theirs in the k directions.
    """

    source: str
    tokens: int
    key: str
    seconds: float
    layers: list[dict[str, Any]]
    factors: dict[str, SpectralFactors] = field(repr=False)

    @property
    def bytes(self) -> int:
        """Return the memory that the factors of all layers take."""
        return sum({id(t): t.nbytes for f in self.factors.values() for t in (f.U, f.sigma, f.V)}.values())

    def record(self) -> dict[str, Any]:
        """Return what an adapter's configuration keeps of it."""
        return {"source": self.source, "tokens": self.tokens, "key": self.key}

    def as_dict(self) -> dict[str, Any]:
        """Return all but the tensors, for JSON."""
        return {**self.record(), "seconds": self.seconds, "factor_bytes": self.bytes, "layers": self.layers}


def calibrate(
    model: nn.Module,
    config: HipLoraConfig,
    run_model: Callable[[], Any] | None = None,
    *,
    rows: Rows = None,
    source: str = "",
    tokens: int = 10_000,
    batch_size: int = 8,
    seed: int = 0,
    gradient_tokens: int = GRADIENT_TOKENS,
    max_bytes: int = 4 << 30,
    store: CalibrationStore | None = None,
    tokenizer: Any = None,
) -> Calibration:
    """Measure the layers that `config` targets, and store the resulting activation basis in `config`.

    Call it before `peft.get_peft_model(model, config)`, like PEFT's own preprocessing steps; without it,
    `get_peft_model` calls it with text sampled from the model. Model, gradients and training mode are restored.

    Args:
        model: the base model; a causal language model where neither `run_model` nor `rows` is given.
        config: its `basis` must be "activation"; it receives the factors.
        run_model: runs the model over your own calibration data, once for each group of layers, twice where the output
            side is protected, which needs the model's logits. Padding is left out where an `attention_mask` is passed.
            Its measurements are not stored.
        rows: token ids to calibrate on, rows of any length; instead of `run_model`.
        source: what to call `rows` in reports.
        tokens: how many to sample from the model without `rows` and `run_model`; half of them are conversations of the
            model with itself, in its chat template or as questions and answers.
        batch_size: rows in one pass; it changes the factors by rounding only.
        seed: of the sampling.
        gradient_tokens: how many of these the output side is measured on, at three times the cost a token.
        max_bytes: memory for moments; layers that do not fit together are measured in several passes.
        store: of sampled text and measurements; an interrupted calibration resumes from it.
        tokenizer: for those conversations; None is the one in the model's folder or hub repository.

    Raises:
        ConfigError: the basis is another one, or an argument makes no sense.
        FactorError: a layer saw no token, or NaN, or has fewer directions than it should protect.
    """
    if config.basis != "activation":
        raise ConfigError(f"basis is {config.basis!r}, which needs no calibration; set basis='activation'")
    if run_model is not None and rows is not None:
        raise ConfigError("calibrate got both run_model and rows; pass the one that holds your data")
    _check_counts(gradient_tokens=gradient_tokens)
    start = time.perf_counter()
    targets = find_targets(model, config)
    text = CalibrationText(model, rows, tokens, batch_size, seed, store, max_bytes, run_model, tokenizer)
    layers: list[dict[str, Any]] = []
    factors: dict[str, SpectralFactors] = {}
    sides = config.basis_sides
    layer_tokens: list[int] = []
    expert_tokens: list[int] = []
    with unrolled(model):
        for group in _memory_groups(targets, sides, max_bytes):
            inputs = text.inputs([target.name for target in group])
            for name, basis in inputs.items():
                (layer_tokens if shared_side(name) is None else expert_tokens).append(basis.tokens)
            ranks: dict[str, int] = {}
            for target in group:
                basis = inputs[target.name]
                k = ranks[target.name] = resolve_rank(target.k, target.shape, lambda basis=basis: basis.values)  # type: ignore[misc]
                measured = {"effective_rank": basis.effective_rank, "energy": basis.energy(k)}
                layers.append({"name": target.name, "shape": target.shape, "k": k, **measured})
            outputs = text.outputs(ranks, gradient_tokens) if sides != "input" else {}
            for name, k in ranks.items():
                weight = frozen_weight(model.get_submodule(name))
                factors[name] = activation_factors(weight, inputs[name], k, sides, outputs.get(name), name=name)
    # An expert sees the tokens that are routed to it, which says little of the text.
    seen = min(layer_tokens or [sum(map(len, text.rows)) or max(expert_tokens)])
    widest = max(target.shape[1] for target in targets)
    if seen < (needed := TOKENS_PER_INPUT * widest):
        warnings.warn(
            f"calibrated on {seen} tokens, few for inputs {widest} wide: the protected directions are noisy; give at "
            f"least {needed} tokens",
            stacklevel=2,
        )
    if rows is None:
        source = SELF if run_model is None else source or "run_model"
    calibration = Calibration(source or "rows", seen, text.key[:16], time.perf_counter() - start, layers, factors)
    config.calibration, config.calibrated = calibration.record(), factors
    return calibration


def calibrate_itself(model: nn.Module, config: HipLoraConfig) -> None:
    """Calibrate on text sampled from the model; warn where the configuration was calibrated on other data before."""
    source = config.calibration.get("source", SELF)
    if source != SELF:
        warnings.warn(
            f"the configuration was calibrated on {source}, but those factors are in another model's adapter or were "
            "not copied with it; this model is calibrated on text of its own instead. For the same data call "
            "hiplora.calibrate(model, config, …) again before the adapter is added",
            stacklevel=2,
        )
    calibrate(model, config)


def check_calibrated(model: nn.Module, config: HipLoraConfig, targets: Iterable[Target]) -> None:
    """Check that the calibrated factors are of these very weights, and of the requested ranks and sides."""
    basis = f"activation:{config.basis_sides}"
    for target in targets:
        factors, k = config.calibrated.get(target.name), target.k
        if factors is None or (isinstance(k, int) and factors.rank != k) or factors.basis != basis:
            raise ConfigError(
                f"layer {target.name}: the calibration has no factors of rank {k} for it; the configuration was "
                "changed after hiplora.calibrate(model, config): call it again"
            )
        if factors.fingerprint != weight_fingerprint(frozen_weight(model.get_submodule(target.name))):
            raise ConfigError(
                f"layer {target.name}: its weight is not the one that was calibrated; call "
                "hiplora.calibrate(model, config) on this very model"
            )


def weight_factors(
    model: nn.Module, config: HipLoraConfig, store: FactorStore | None = None
) -> Iterator[tuple[Target, SpectralFactors]]:
    """Yield each layer that this configuration targets, with its certified factors.

    They are stored one by one (by default in the user's cache), so an interrupted run resumes where it stopped.
    Errors are those of `find_targets` and `FactorStore.get_or_compute`.
    """
    store, targets = store or FactorStore(), find_targets(model, config)
    with unrolled(model):
        for target in tqdm(targets, "factoring weights", unit=" modules", delay=2, leave=False, disable=None):
            weight = frozen_weight(model.get_submodule(target.name))
            energies = functools.partial(squared_singular_values, weight, target.name)
            k = resolve_rank(config.principal_ranks.get(target.name, target.k), target.shape, energies)
            yield target, store.get_or_compute(weight, k, config.svd_tolerance, name=target.name)


def input_bases(model: nn.Module, modules: Sequence[str], **options: Any) -> Bases:
    """Measure linear layers' inputs: module → eigenvectors of their second moment; options as `CalibrationText`."""
    return CalibrationText(model, **options).inputs(modules)


def _check_counts(**counts: Any) -> None:
    """Check that numbers of tokens, rows or bytes are positive integers (ConfigError)."""
    for name, value in counts.items():
        least = 2 if name == "tokens" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} is {value!r}; expected an integer of at least {least}")


def _memory_groups(targets: Iterable[Target], sides: str, max_bytes: int) -> list[list[Target]]:
    """Split layers, in order, into groups whose float64 moments fit into memory together; one alone always fits."""
    groups: list[list[Target]] = []
    group_bytes = 0
    for target in targets:
        m, n = target.shape
        size = 8 * (n**2 if sides == "input" else max(m, n) ** 2)  # the sides are measured one after the other
        if not groups or group_bytes + size > max_bytes:
            groups.append([])
            group_bytes = 0
        groups[-1].append(target)
        group_bytes += size
    return groups


class CalibrationText:
    """The rows or loop that a model is calibrated on, and its measurements; `key` identifies rows and model."""

    def __init__(
        self,
        model: nn.Module,
        rows: Rows = None,
        tokens: int = 10_000,
        batch_size: int = 8,
        seed: int = 0,
        store: CalibrationStore | None = None,
        max_bytes: int = 4 << 30,
        run_model: Callable[[], Any] | None = None,
        tokenizer: Any = None,
    ):
        """Take `rows` of token ids, or sample about `tokens` from the model; options and errors as `calibrate`."""
        _check_counts(tokens=tokens, batch_size=batch_size, max_bytes=max_bytes)
        self._model, self._store, self._max_bytes = model, store or CalibrationStore(), max_bytes
        self._batch_size, self._run_model, self.key = batch_size, run_model, ""
        self.rows: list[Tensor] = []
        if run_model is not None:
            return
        identity = model_fingerprint(model)
        if rows is None:
            self.rows = sampled_rows(model, tokens, seed, self._store, identity, tokenizer)
        else:
            self.rows = [torch.as_tensor(row, dtype=torch.long) for row in rows]
            accepted = inspect.signature(model.forward).parameters
            if getattr(getattr(model, "config", None), "is_encoder_decoder", False) or "input_ids" not in accepted:
                raise ConfigError(f"{type(model).__name__} does not run on rows of token ids alone; {OWN_DATA}")
        if not self.rows:
            raise ConfigError("rows is empty; calibration needs token ids")
        vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
        context = position_limit(model) if isinstance(model, PreTrainedModel) else None
        digest = hashlib.sha256(identity.encode())
        for index, row in enumerate(self.rows):
            if row.dim() != 1 or len(row) == 0:
                raise ConfigError(f"rows[{index}] has shape {tuple(row.shape)}; expected a list of token ids")
            if vocabulary is not None and not 0 <= int(row.min()) <= int(row.max()) < vocabulary:
                raise ConfigError(
                    f"rows[{index}] has token ids from {row.min()} to {row.max()}, and the model's vocabulary has "
                    f"{vocabulary}; encode the text with the model's own tokenizer"
                )
            if context is not None and len(row) > context:
                raise ConfigError(
                    f"rows[{index}] has {len(row)} tokens, and the model reads {context} at most; cut it into shorter "
                    "rows"
                )
            digest.update(len(row).to_bytes(8, "little") + row.cpu().numpy().astype("<i8").tobytes())
        self.key = digest.hexdigest()

    def run(self, head: bool = True) -> None:
        """Run the model over the text once, padded on the right; without `head` its head sees the last tokens only."""
        if self._run_model is not None:
            self._run_model()
        else:
            _run(self._model, self.rows, self._batch_size, "inputs", head)

    def inputs(self, modules: Iterable[str], trailing: Mapping[str, int] | None = None) -> Bases:
        """Measure the inputs of some layers: their eigenvectors, or of each the last so many (`trailing`)."""
        bases: Bases = {}
        head = getattr(self._model, "get_output_embeddings", lambda: None)()
        targets = (measured_target(self._model.get_submodule(name), name) for name in modules)
        for group in _memory_groups(targets, "input", self._max_bytes):
            names = [target.name for target in group]
            ranks = {name: trailing[name] for name in names} if trailing else None
            key = ["moments", self.key, names] if ranks is None else ["trailing", self.key, list(ranks.items())]
            run = functools.partial(self.run, any(self._model.get_submodule(name) is head for name in names))
            bases |= self._stored(key, functools.partial(measure_inputs, self._model, names, run, ranks))
        return bases

    def outputs(self, ranks: Mapping[str, int], limit: int) -> Bases:
        """Measure which outputs of some layers matter: k directions of each, on `limit` tokens."""
        before = itertools.accumulate((len(row) for row in self.rows), initial=0)
        rows = [row for row, total in zip(self.rows, before, strict=False) if total < limit]
        batch_size = -(-self._batch_size // 2)  # a backward pass holds all activations
        run = self._run_model or functools.partial(_run, self._model, rows, batch_size, "gradients")
        measure = functools.partial(measure_outputs, self._model, ranks, run, limit)
        return self._stored(["outputs", self.key, limit, list(ranks.items())], measure)

    def _stored(self, key: list[Any], measure: Callable[[], Bases]) -> Bases:
        """Return the stored measurement, or measure and store it; a basis that layers share is stored once."""
        if not self.key:
            return measure()

        def make() -> tuple[dict[str, Tensor], Any]:
            bases = measure()
            first: dict[int, str] = {}
            leaders = {name: first.setdefault(id(basis), name) for name, basis in bases.items()}
            parts = ("values", "vectors")
            tensors = {f"{n}.{part}": getattr(bases[n], part) for n in first.values() for part in parts}
            return tensors, {"leader": leaders, "tokens": {n: bases[n].tokens for n in first.values()}}

        tensors, record = self._store.get_or_make(self._store.path("bases", *key), make)
        measured = {
            name: MomentBasis(tensors[f"{name}.values"], tensors[f"{name}.vectors"], tokens)
            for name, tokens in record["tokens"].items()
        }
        return {name: measured[leader] for name, leader in record["leader"].items()}


def _run(model: nn.Module, rows: Sequence[Tensor], batch_size: int, quantity: str, head: bool = True) -> None:
    """Run the model over rows of token ids, padded on the right; without `head` its head sees the last tokens only."""
    device = next(model.parameters()).device
    accepted = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": False, **({} if head else {"logits_to_keep": 1})}
    starts = range(0, len(rows), batch_size)
    for first in tqdm(starts, desc=f"calibrating: {quantity}", unit=" batches", delay=2, leave=False, disable=None):
        batch = rows[first : first + batch_size]
        ids = nn.utils.rnn.pad_sequence(list(batch), batch_first=True).to(device)
        lengths = torch.tensor([len(row) for row in batch], device=device)
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        arguments = {"attention_mask": mask.long(), **options}
        model(input_ids=ids, **{name: value for name, value in arguments.items() if name in accepted})
