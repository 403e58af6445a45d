"""Compute a method's protected factors on the base, so that the trainings that share them find them in the cache.

Settings: `method`, a method of a recipe that has factors; `files`, hashes of what is read.
"""

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter

from hiplora.errors import ConfigError
from hiplora.models import load
from hiplora.spectral import FactorStore, SpectralFactors, resolve_rank, squared_singular_values
from hiplora.study.engine.jobs import Job
from hiplora.study.steps.methods import method_at
from hiplora.training.baselines.hiplora import Spectral
from hiplora.training.methods import AnyMethod
from hiplora.training.train import machine_dtype, torch_dtype
from hiplora.tuner import CalibrationStore, HipLoraConfig, find_targets, frozen_weight

if TYPE_CHECKING:
    from hiplora.study.engine.bench import Bench


@dataclass(frozen=True)
class _Factored:
    """The factors of a method's layers, the mean share of the inputs' energy that they hold, whether all were there."""

    factors: Sequence[SpectralFactors]
    energy: float | None
    reused: bool


def work(bench: "Bench", job: Job, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fill the cache, and say what is in it; what is there already is verified and left alone.

    The factors are those of the weights as a training of `dtype: auto` has them on this machine. The result has the
    `basis`; `layers`, the number of matrices; `k`, the common one or a list; `bytes` of all factors; `residual`, the
    largest, of the weight basis (the directions of inputs are no singular vectors); `energy`, the mean share of the
    inputs' energy that the activation basis holds.

    Raises:
        ConfigError: the method has no factors, or does not fit the model.
        FactorError: a weight cannot be decomposed.
    """
    method = TypeAdapter(AnyMethod).validate_python(method_at(bench, settings["method"]))
    if not isinstance(method, Spectral):
        raise ConfigError(f"{job.name}: method {method.name} has no factors; take the job out")
    config = method.peft_config()
    assert isinstance(config, HipLoraConfig)
    model, tokenizer = _as_trained(bench)
    began = time.perf_counter()
    activation = method.basis == "activation"
    found = _by_inputs(model, tokenizer, method, config) if activation else _by_weights(model, config)
    ranks = [factors.rank for factors in found.factors]
    return {
        "basis": method.basis,
        "layers": len(ranks),
        "k": ranks[0] if len(set(ranks)) == 1 else ranks,
        "residual": None if activation else max(factors.residual for factors in found.factors),
        "bytes": sum(part.nbytes for f in found.factors for part in (f.U, f.sigma, f.V)),
        "energy": found.energy,
    }, {"factorize_seconds": time.perf_counter() - began, "reused": found.reused}


def _as_trained(bench: "Bench") -> tuple[Any, Any]:
    """Return the base in the precision that trainings have, which on a GPU need not be the one it is scored in."""
    model, tokenizer = bench.model()
    dtype = torch_dtype(machine_dtype())
    if model.dtype == dtype:
        return model, tokenizer
    model, tokenizer = load(bench.name, dtype)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _by_weights(model: Any, config: HipLoraConfig) -> _Factored:
    store, factors = FactorStore(), []
    for target in find_targets(model, config):
        weight = frozen_weight(model.get_submodule(target.name))
        k = resolve_rank(target.k, target.shape, functools.partial(squared_singular_values, weight))
        factors.append(store.get_or_compute(weight, k, config.svd_tolerance, name=target.name))
    return _Factored(factors, None, reused=store.made == 0)


def _by_inputs(model: Any, tokenizer: Any, method: Spectral, config: HipLoraConfig) -> _Factored:
    store = CalibrationStore()
    found = method.calibrate(config, model, tokenizer, store)
    energy = sum(layer.energy for layer in found.layers) / len(found.layers)
    return _Factored(list(found.factors.values()), energy, reused=store.made == 0)
