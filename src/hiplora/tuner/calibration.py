"""Calibration: what the layers of a model are fed, and the protected directions that follow from it."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from hiplora.errors import ConfigError
from hiplora.spectral import MomentBasis, SpectralFactors, activation_factors, resolve_rank
from hiplora.tuner.config import HipLoraConfig
from hiplora.tuner.inputs import (
    ROW_LENGTH,
    CalibrationText,
    UsersLoop,
    check_counts,
    input_bases,
    module_names,
    target_groups,
)
from hiplora.tuner.model import as_layer
from hiplora.tuner.moments import Bases, CalibrationStore
from hiplora.tuner.targets import Target, survey

__all__ = ["ROW_LENGTH", "SELF", "CalibratedLayer", "Calibration", "calibrate", "input_bases"]
SELF = "self"  # the source: text sampled from the model itself
TOKENS_PER_INPUT = 2  # fewer tokens than this many times the width give an unsteady moment


@dataclass(frozen=True)
class CalibratedLayer:
    """What was found about one layer: its width n, k, and the share of its inputs' energy in the k directions."""

    name: str
    shape: tuple[int, int]
    k: int
    effective_rank: float
    energy: float
    shares_input_with: str | None


@dataclass(frozen=True)
class Calibration:
    """The protected directions of a model's layers, and what they were measured on.

    `source` is "self", or says in words where the text came from; `tokens` were seen by each layer; `key` names
    model and text; `bytes` is the memory of all factors.
    """

    source: str
    tokens: int
    key: str
    seconds: float
    layers: list[CalibratedLayer]
    factors: dict[str, SpectralFactors] = field(repr=False)

    @property
    def bytes(self) -> int:
        """Return the memory that the factors of all layers take."""
        parts = {id(t): t.nbytes for f in self.factors.values() for t in (f.U, f.sigma, f.V)}
        return sum(parts.values())

    def record(self) -> dict[str, Any]:
        """Return what an adapter's configuration keeps of it."""
        return {"source": self.source, "tokens": self.tokens, "key": self.key}

    def as_dict(self) -> dict[str, Any]:
        """Return all but the tensors, for JSON."""
        layers = [asdict(layer) for layer in self.layers]
        return {**self.record(), "seconds": self.seconds, "factor_bytes": self.bytes, "layers": layers}


def calibrate(
    model: nn.Module,
    config: HipLoraConfig,
    run_model: Callable[[], Any] | None = None,
    *,
    rows: Sequence[Sequence[int] | Tensor] | Tensor | None = None,
    source: str = "",
    tokens: int = 10_000,
    batch_size: int = 8,
    seed: int = 0,
    gradient_tokens: int = 4096,
    max_bytes: int = 4 << 30,
    max_factor_bytes: int = 4 << 30,
    store: CalibrationStore | None = None,
) -> Calibration:
    """Measure what the target layers of `config` are fed, and give `config` the activation basis that follows.

    Call it before `peft.get_peft_model(model, config)`, as PEFT's own preprocessing steps are called; without it
    `get_peft_model` does so by itself, with text sampled from the model. Model, gradients and training mode are
    left as they were.

    Args:
        model: the base model; a causal language model where neither `run_model` nor `rows` is given.
        config: its `basis` must be "activation"; it is given the factors.
        run_model: runs the model over your own calibration data, once for each group of layers. Padding is left
            out where an `attention_mask` is passed. Twice as often where the output side is protected, which needs
            the model's logits. What it measures is not stored.
        rows: token ids to calibrate on, rows of any length; instead of `run_model`.
        source: what to call `rows` in reports.
        tokens: how many to sample from the model where nothing else is given.
        batch_size: rows in one pass; it changes the factors by rounding only.
        seed: of the sampling.
        gradient_tokens: of these, how many the output side is measured on, at three times the cost a token.
        max_bytes: memory for moments; layers that do not fit together are measured in several passes.
        max_factor_bytes: memory that the factors of all layers may take; a principal rank that needs more is an error.
        store: where sampled text and measurements are kept; an interrupted calibration goes on from there.

    Raises:
        ConfigError: the basis is another one, an argument makes no sense, or the factors exceed `max_factor_bytes`.
        FactorError: a layer saw no token, or NaN, or has fewer directions than it is to protect.
    """
    if config.basis != "activation":
        raise ConfigError(f"basis is {config.basis!r}, which needs no calibration; set basis='activation'")
    if run_model is not None and rows is not None:
        raise ConfigError("calibrate got both run_model and rows; pass the one that holds your data")
    check_counts(
        tokens=tokens,
        batch_size=batch_size,
        gradient_tokens=gradient_tokens,
        max_bytes=max_bytes,
        max_factor_bytes=max_factor_bytes,
    )
    start = time.perf_counter()
    targets = survey(model, config)
    text: UsersLoop | CalibrationText
    if run_model is not None:
        source, text = source or "run_model", UsersLoop(model, run_model)
    else:
        source = source or "rows" if rows is not None else SELF
        text = CalibrationText(model, rows, tokens, batch_size, seed, store)
    layers: list[CalibratedLayer] = []
    factors: dict[str, SpectralFactors] = {}
    seen = held = 0
    for group in target_groups(targets, config.basis_sides, max_bytes):
        bases = text.inputs(module_names(group))
        seen = min(bases[target.name].tokens for target in group)
        group = [_with_rank(target, bases[target.name]) for target in group]
        held = _bounded(group, held, max_factor_bytes)
        layers += _described(group, bases)
        outputs = text.outputs(group, gradient_tokens) if config.basis_sides != "input" else {}
        for target in group:
            factors[target.name] = _factors(
                model, target, bases[target.name], outputs.get(target.name), config.basis_sides
            )
    calibration = Calibration(source, seen, text.key[:16], time.perf_counter() - start, layers, factors)
    _warn_of_few(calibration)
    config.calibration, config.calibrated = calibration.record(), factors
    return calibration


def _factors(
    model: nn.Module, target: Target, inputs: MomentBasis, outputs: MomentBasis | None, sides: str
) -> SpectralFactors:
    weight = as_layer(model.get_submodule(target.name), target.name).frozen_weight()
    return activation_factors(weight, inputs, int(target.k), sides, outputs, name=target.name)


def _with_rank(target: Target, inputs: MomentBasis) -> Target:
    """Settle how many directions a layer protects, now that its inputs are known."""
    return dataclasses.replace(target, k=resolve_rank(target.k, target.shape, lambda: inputs.values))


def _bounded(group: Sequence[Target], held: int, limit: int) -> int:
    """Return the bytes of all factors once those of a group are made; an error before they are, if it is too many."""
    for target in group:
        held += 4 * int(target.k) * (sum(target.shape) + 1)
        if held > limit:
            raise ConfigError(
                f"layer {target.name}: with its principal_rank of {target.k} the factors of all layers so far take "
                f"{held:,} bytes, more than the limit of {limit:,}; lower principal_rank, adapt fewer modules, or "
                "raise max_factor_bytes"
            )
    return held


def _described(group: Sequence[Target], bases: Bases) -> Iterator[CalibratedLayer]:
    first: dict[int, str] = {}
    for target in group:
        inputs = bases[target.name]
        leader = first.setdefault(id(inputs), target.name)
        yield CalibratedLayer(
            target.name,
            target.shape,
            int(target.k),
            inputs.effective_rank,
            inputs.energy(int(target.k)),
            leader if leader != target.name else None,
        )


def _warn_of_few(calibration: Calibration) -> None:
    """Say where there were too few tokens, and how many are needed."""
    widest = max(layer.shape[1] for layer in calibration.layers)
    if calibration.tokens < (needed := TOKENS_PER_INPUT * widest):
        warnings.warn(
            f"calibrated on {calibration.tokens} tokens, few for inputs {widest} wide: the protected directions "
            f"are unsteady; give at least {needed} tokens",
            stacklevel=3,
        )
