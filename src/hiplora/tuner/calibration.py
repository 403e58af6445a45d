"""Calibration: what the layers of a model are fed, and the protected directions that follow from it."""

from __future__ import annotations

import functools
import hashlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hiplora.errors import ConfigError
from hiplora.spectral import InputBasis, SpectralFactors, activation_factors
from hiplora.tuner.config import HipLoraConfig
from hiplora.tuner.model import as_layer
from hiplora.tuner.moments import Bases, CalibrationStore, MomentCollector, model_fingerprint
from hiplora.tuner.sampling import sample_rows
from hiplora.tuner.targets import Target, survey

ROW_LENGTH = 256  # tokens of one calibration row
SELF = "self"  # the source: text sampled from the model itself
TOKENS_PER_INPUT = 2  # fewer tokens than this many times the width give an unsteady moment
_SAMPLED_AT_ONCE = 20


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
    max_bytes: int = 4 << 30,
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
            out where an `attention_mask` is passed. What it measures is not stored.
        rows: token ids to calibrate on, rows of any length; instead of `run_model`.
        source: what to call `rows` in reports.
        tokens: how many to sample from the model where nothing else is given.
        batch_size: rows in one pass; it changes the factors by rounding only.
        seed: of the sampling.
        max_bytes: memory for moments; layers that do not fit together are measured in several passes.
        store: where sampled text and measurements are kept; an interrupted calibration goes on from there.

    Raises:
        ConfigError: the basis is another one, or an argument makes no sense.
        FactorError: a layer saw no token, or NaN.
    """
    _check(config, run_model, rows, tokens, batch_size, max_bytes)
    start = time.perf_counter()
    targets = survey(model, config)
    groups = list(_groups(targets, max_bytes))
    if run_model is not None:
        source, key = source or "run_model", ""
        found = (_measure(model, group, run_model)[0] for group in groups)
    else:
        store, identity = store or CalibrationStore(), model_fingerprint(model)
        if rows is None:
            texts, source = _sampled(model, store, identity, tokens, seed), SELF
        else:
            texts, source = [torch.as_tensor(row, dtype=torch.long) for row in rows], source or "rows"
        _check_rows(texts)
        key = _key(identity, texts)
        run = functools.partial(_run, model, texts, batch_size)
        found = (_measured(model, group, run, store, key) for group in groups)
    layers: list[CalibratedLayer] = []
    factors: dict[str, SpectralFactors] = {}
    seen = 0
    for group, bases in zip(groups, found, strict=True):
        seen = min(bases[target.name].tokens for target in group)
        layers += _described(group, bases)
        for target in group:
            factors[target.name] = _factors(model, target, bases[target.name], config.sides)
    calibration = Calibration(source, seen, key[:16], time.perf_counter() - start, layers, factors)
    _warn_of_few(calibration)
    config.calibration, config.calibrated = calibration.record(), factors
    return calibration


def _check(
    config: HipLoraConfig, run_model: Any, rows: Any, tokens: int, batch_size: int, max_bytes: int
) -> None:
    if config.basis != "activation":
        raise ConfigError(f"basis is {config.basis!r}, which needs no calibration; set basis='activation'")
    if run_model is not None and rows is not None:
        raise ConfigError("calibrate got both run_model and rows; pass the one that holds your data")
    for name, value, least in (
        ("tokens", tokens, 2),
        ("batch_size", batch_size, 1),
        ("max_bytes", max_bytes, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} is {value!r}; expected an integer of at least {least}")


def _check_rows(rows: Sequence[Tensor]) -> None:
    if not rows:
        raise ConfigError("rows is empty; calibration needs token ids")
    for index, row in enumerate(rows):
        if row.dim() != 1 or len(row) == 0:
            raise ConfigError(f"rows[{index}] has shape {tuple(row.shape)}; expected a list of token ids")


def _groups(targets: Sequence[Target], max_bytes: int) -> Iterator[list[Target]]:
    """Split layers, in order, into groups whose float64 moments fit into memory together; one alone always fits."""
    group: list[Target] = []
    held = 0
    for target in targets:
        size = 8 * target.shape[1] ** 2
        if group and held + size > max_bytes:
            yield group
            group, held = [], 0
        group.append(target)
        held += size
    if group:
        yield group


def _sampled(
    model: nn.Module, store: CalibrationStore, identity: str, tokens: int, seed: int
) -> list[Tensor]:
    """Return rows sampled from the model, about `tokens` in all; rows that were sampled before are read."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr,operator]
    length = min(ROW_LENGTH, limit or ROW_LENGTH, tokens)
    count = -(-tokens // length)
    rows: list[Tensor] = []
    collector = MomentCollector(model, ())  # for what it does to adapters and modes
    with collector.watching():
        for first in range(0, count, _SAMPLED_AT_ONCE):
            part = range(first, min(first + _SAMPLED_AT_ONCE, count))
            path = store.path("sample", identity, length, seed, part.start, part.stop)
            read = store.read(path)
            sampled = read[0]["rows"].long() if read else sample_rows(model, part, length, seed)
            if read is None:
                store.write(path, {"rows": sampled.int()}, {})
            rows.extend(sampled)
    return rows


def _key(identity: str, rows: Sequence[Tensor]) -> str:
    """Name what the moments are measured on, however the rows are batched."""
    digest = hashlib.sha256(identity.encode())
    for row in rows:
        digest.update(len(row).to_bytes(8, "little") + row.cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _run(model: nn.Module, rows: Sequence[Tensor], batch_size: int) -> None:
    """Run the model over rows of token ids, padded on the right where they differ in length."""
    device = next(model.parameters()).device
    starts = range(0, len(rows), batch_size)
    for first in tqdm(starts, desc="calibrating", unit=" batches", delay=2, leave=False, disable=None):
        batch = rows[first : first + batch_size]
        ids = nn.utils.rnn.pad_sequence(list(batch), batch_first=True).to(device)
        lengths = torch.tensor([len(row) for row in batch], device=device)
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        model(input_ids=ids, attention_mask=mask.long(), use_cache=False)


def _measured(
    model: nn.Module, group: Sequence[Target], run: Callable[[], Any], store: CalibrationStore, key: str
) -> Bases:
    """Measure a group of layers, or read what an earlier calibration measured."""
    names = [target.name for target in group]
    path = store.path("moments", key, names)
    bases = store.read_bases(path, names)
    if bases is None:
        bases, leader = _measure(model, group, run)
        store.write_bases(path, bases, leader)
    return bases


def _measure(
    model: nn.Module, group: Sequence[Target], run: Callable[[], Any]
) -> tuple[Bases, dict[str, str]]:
    collector = MomentCollector(model, [target.name for target in group])
    with collector.watching():
        run()
    return collector.bases(), collector.leader


def _factors(model: nn.Module, target: Target, inputs: InputBasis, sides: str) -> SpectralFactors:
    layer = as_layer(model.get_submodule(target.name), target.name)
    return activation_factors(layer.frozen_weight(), inputs, target.k, sides, name=target.name)


def _described(group: Sequence[Target], bases: Bases) -> Iterator[CalibratedLayer]:
    first: dict[int, str] = {}
    for target in group:
        inputs = bases[target.name]
        leader = first.setdefault(id(inputs), target.name)
        yield CalibratedLayer(
            target.name,
            target.shape,
            target.k,
            inputs.effective_rank,
            inputs.energy(target.k),
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
