"""The factors of a model's layers in either basis: calibrated on text, or of the weights, from the store."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn
from tqdm import tqdm

from hiplora.errors import ConfigError
from hiplora.spectral import FactorStore, SpectralFactors, activation_factors, resolve_rank, squared_singular_values
from hiplora.tuner.config import HipLoraConfig
from hiplora.tuner.experts import shared_side, unrolled
from hiplora.tuner.moments import Bases
from hiplora.tuner.targets import Target, find_targets, frozen_weight
from hiplora.tuner.text import CalibrationStore, CalibrationText, Rows, check_counts, memory_groups

SELF = "self"  # the source: text sampled from the model itself
TOKENS_PER_INPUT = 2  # fewer tokens than this many times the width give a noisy moment


@dataclass(frozen=True)
class CalibratedLayer:
    """One layer's shape, k, effective rank of its inputs, and the share of their energy in the k directions."""

    name: str
    shape: tuple[int, int]
    k: int
    effective_rank: float
    energy: float


@dataclass(frozen=True)
class Calibration:
    """The protected directions of a model's layers, and what they were measured on.

    `source` is "self", or describes the text; `tokens` were seen by each layer; `key` identifies model and text.
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
        return sum({id(t): t.nbytes for f in self.factors.values() for t in (f.U, f.sigma, f.V)}.values())

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
    rows: Rows = None,
    source: str = "",
    tokens: int = 10_000,
    batch_size: int = 8,
    seed: int = 0,
    gradient_tokens: int = 4096,
    max_bytes: int = 4 << 30,
    store: CalibrationStore | None = None,
    tokenizer: Any = None,
) -> Calibration:
    """Measure the layers that `config` targets, and give `config` the activation basis that follows.

    Call it before `peft.get_peft_model(model, config)`, like PEFT's own preprocessing steps; without it,
    `get_peft_model` calls it with text sampled from the model. Model, gradients and training mode are restored.

    Args:
        model: the base model; a causal language model where neither `run_model` nor `rows` is given.
        config: its `basis` must be "activation"; it is given the factors.
        run_model: runs the model over your own calibration data, once for each group of layers. Padding is left
            out where an `attention_mask` is passed. Twice as often where the output side is protected, which needs
            the model's logits. What it measures is not stored.
        rows: token ids to calibrate on, rows of any length; instead of `run_model`.
        source: what to call `rows` in reports.
        tokens: how many to sample from the model where nothing else is given; half of them are conversations that the
            model has with itself, in its chat template or as questions and answers.
        batch_size: rows in one pass; it changes the factors by rounding only.
        seed: of the sampling.
        gradient_tokens: of these, how many the output side is measured on, at three times the cost a token.
        max_bytes: memory for moments; layers that do not fit together are measured in several passes.
        store: where sampled text and measurements are kept; an interrupted calibration goes on from there.
        tokenizer: for those conversations; None is the one that lies beside the model.

    Raises:
        ConfigError: the basis is another one, or an argument makes no sense.
        FactorError: a layer saw no token, or NaN, or has fewer directions than it is to protect.
    """
    if config.basis != "activation":
        raise ConfigError(f"basis is {config.basis!r}, which needs no calibration; set basis='activation'")
    if run_model is not None and rows is not None:
        raise ConfigError("calibrate got both run_model and rows; pass the one that holds your data")
    check_counts(gradient_tokens=gradient_tokens)
    start = time.perf_counter()
    targets = find_targets(model, config)
    text = CalibrationText(model, rows, tokens, batch_size, seed, store, max_bytes, run_model, tokenizer)
    if run_model is None and rows is None:
        source = SELF
    layers: list[CalibratedLayer] = []
    factors: dict[str, SpectralFactors] = {}
    seen = 0
    with unrolled(model):
        for group in memory_groups(targets, config.basis_sides, max_bytes):
            inputs = text.inputs([target.name for target in group])
            seen = min((basis.tokens for name, basis in inputs.items() if shared_side(name) is None), default=tokens)
            ranks: dict[str, int] = {}
            for target in group:
                basis, shape = inputs[target.name], target.shape
                k = resolve_rank(target.k, shape, lambda basis=basis: basis.values)  # type: ignore[misc]
                ranks[target.name] = k
                layers.append(CalibratedLayer(target.name, shape, k, basis.effective_rank, basis.energy(k)))
            outputs = text.outputs(ranks, gradient_tokens) if config.basis_sides != "input" else {}
            for name, k in ranks.items():
                weight = frozen_weight(model.get_submodule(name))
                factors[name] = activation_factors(
                    weight, inputs[name], k, config.basis_sides, outputs.get(name), name=name
                )
    widest = max(target.shape[1] for target in targets)
    if seen < TOKENS_PER_INPUT * widest:
        warnings.warn(
            f"calibrated on {seen} tokens, few for inputs {widest} wide: the protected directions are noisy; give at "
            f"least {TOKENS_PER_INPUT * widest} tokens",
            stacklevel=2,
        )
    source = source or ("rows" if run_model is None else "run_model")
    calibration = Calibration(source, seen, text.key[:16], time.perf_counter() - start, layers, factors)
    config.calibration, config.calibrated = calibration.record(), factors
    return calibration


def weight_factors(
    model: nn.Module, config: HipLoraConfig, store: FactorStore | None = None
) -> Iterator[tuple[Target, SpectralFactors]]:
    """Yield each layer that an adapter of this configuration would sit on, with its certified factors.

    They are stored one by one (by default in the user's cache), so an interrupted run goes on where it stopped.

    Raises:
        ConfigError: as `find_targets`.
        FactorError, StoreError: as `FactorStore.get_or_compute`.
    """
    store = store or FactorStore()
    targets = find_targets(model, config)
    with unrolled(model):
        for target in tqdm(targets, "factoring weights", unit=" modules", delay=2, leave=False, disable=None):
            weight = frozen_weight(model.get_submodule(target.name))
            energies = functools.partial(squared_singular_values, weight)
            k = resolve_rank(config.principal_ranks.get(target.name, target.k), target.shape, energies)
            yield target, store.get_or_compute(weight, k, config.svd_tolerance, name=target.name)


def input_bases(model: nn.Module, modules: Sequence[str], **options: Any) -> Bases:
    """Measure the inputs of some linear layers of a base model: module name → eigenvectors of their second moment.

    Options are `CalibrationText`'s: `rows`, `tokens`, `batch_size`, `seed`, `max_bytes`, `store`.
    """
    return CalibrationText(model, **options).inputs(modules)
