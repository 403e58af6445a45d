"""What the linear layers of a model are fed, and which of their outputs matter: measured on some text, or read back."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hiplora.errors import ConfigError
from hiplora.spectral import MomentBasis, SecondMoment
from hiplora.tuner.gradients import GradientCollector
from hiplora.tuner.model import as_layer
from hiplora.tuner.moments import Bases, CalibrationStore, MomentCollector, model_fingerprint
from hiplora.tuner.sampling import sample_rows
from hiplora.tuner.targets import Target

ROW_LENGTH = 256  # tokens of one calibration row
_SAMPLED_AT_ONCE = 40


def input_bases(
    model: nn.Module,
    modules: Sequence[str],
    *,
    rows: Sequence[Sequence[int] | Tensor] | Tensor | None = None,
    tokens: int = 10_000,
    batch_size: int = 8,
    seed: int = 0,
    max_bytes: int = 4 << 30,
    store: CalibrationStore | None = None,
) -> Bases:
    """Measure what some linear layers of a base model are fed: module name → eigenvectors of its inputs' moment.

    Arguments and errors are those of `calibrate`, which puts the same measurement to use for an adapter to come.
    """
    check_counts(tokens=tokens, batch_size=batch_size, max_bytes=max_bytes)
    targets = [_target(model, name) for name in modules]
    text = CalibrationText(model, rows, tokens, batch_size, seed, store)
    bases: Bases = {}
    for group in target_groups(targets, "input", max_bytes):
        bases |= text.inputs(module_names(group))
    return bases


def least_inputs(
    model: nn.Module,
    ranks: Mapping[str, int],
    *,
    rows: Sequence[Sequence[int] | Tensor] | Tensor | None = None,
    tokens: int = 10_000,
    batch_size: int = 8,
    seed: int = 0,
    max_bytes: int = 4 << 30,
    store: CalibrationStore | None = None,
) -> Bases:
    """Measure what some linear layers are fed least: module name → as many directions as `ranks` says, (n, r).

    They have the least energy of all r-dimensional spaces. Arguments and errors are those of `calibrate`.
    """
    check_counts(tokens=tokens, batch_size=batch_size, max_bytes=max_bytes)
    targets = [dataclasses.replace(_target(model, name), k=rank) for name, rank in ranks.items()]
    text = CalibrationText(model, rows, tokens, batch_size, seed, store)
    bases: Bases = {}
    for group in target_groups(targets, "input", max_bytes):
        bases |= text.least(group)
    return bases


def _target(model: nn.Module, name: str) -> Target:
    layer = as_layer(model.get_submodule(name), name)
    return Target(name, (layer.out_features, layer.in_features), 0, layer.transposed)


def module_names(group: Sequence[Target]) -> list[str]:
    """Return the names of some targets."""
    return [target.name for target in group]


class UsersLoop:
    """A loop of the user's own that a model is calibrated on; nothing of it is stored."""

    key = ""

    def __init__(self, model: nn.Module, run_model: Callable[[], Any]):
        self._model, self._run = model, run_model

    def inputs(self, modules: Sequence[str]) -> Bases:
        """Measure what a group of layers is fed."""
        return _measure(self._model, modules, self._run)[0]

    def outputs(self, targets: Sequence[Target], limit: int) -> Bases:
        """Measure which outputs of a group of layers matter: k directions of each, on `limit` tokens."""
        return _measure_gradients(self._model, targets, self._run, limit)


class CalibrationText:
    """The tokens that a model is calibrated on, and what was measured on them, as far as it is stored."""

    def __init__(
        self,
        model: nn.Module,
        rows: Sequence[Sequence[int] | Tensor] | Tensor | None,
        tokens: int,
        batch_size: int,
        seed: int,
        store: CalibrationStore | None,
    ):
        self._model, self._store = model, store or CalibrationStore()
        identity = model_fingerprint(model)
        if rows is None:
            texts = _sampled(model, self._store, identity, tokens, seed)
        else:
            texts = [torch.as_tensor(row, dtype=torch.long) for row in rows]
        _check_rows(texts)
        self.key = _key(identity, texts)
        self._texts, self._batch_size = texts, batch_size

    def inputs(self, modules: Sequence[str]) -> Bases:
        """Measure what a group of layers is fed, or read what an earlier calibration measured."""
        path = self._store.path("moments", self.key, list(modules))
        bases = self._store.read_bases(path, modules)
        if bases is None:
            bases, leader = _measure(self._model, modules, self.run)
            self._store.write_bases(path, bases, leader)
        return bases

    def run(self) -> None:
        """Run the model over the text as it is, for measurements of another kind; padding stands on the right."""
        _run(self._model, self._texts, self._batch_size, "inputs")

    def least(self, targets: Sequence[Target]) -> Bases:
        """Measure what a group of layers is fed least, or read it: k directions of each."""
        path = self._store.path("least", self.key, [(target.name, target.k) for target in targets])
        return self._kept(path, targets, lambda: _measure_least(self._model, targets, self.run))

    def outputs(self, targets: Sequence[Target], limit: int) -> Bases:
        """Measure which outputs of a group of layers matter, or read it: k directions of each, on `limit` tokens."""
        path = self._store.path("gradients", self.key, limit, [(target.name, target.k) for target in targets])
        rows = [
            row
            for row, before in zip(self._texts, _running_total(self._texts), strict=True)
            if before < limit
        ]
        few = -(-self._batch_size // 2)  # a backward pass holds all activations
        run = functools.partial(_run, self._model, rows, few, "gradients")
        return self._kept(path, targets, lambda: _measure_gradients(self._model, targets, run, limit))

    def _kept(self, path: Path, targets: Sequence[Target], measure: Callable[[], Bases]) -> Bases:
        """Return the bases of a file of the store, measured first where it is not there."""
        names, read = module_names(targets), self._store.read(path)
        if read is not None:
            return {
                name: MomentBasis(read[0][f"{name}.values"], read[0][f"{name}.vectors"], read[1])
                for name in names
            }
        found = measure()
        parts = ("values", "vectors")
        tensors = {f"{name}.{part}": getattr(found[name], part).clone() for name in names for part in parts}
        self._store.write(path, tensors, min(basis.tokens for basis in found.values()))
        return found


def _running_total(rows: Sequence[Tensor]) -> list[int]:
    """Return, for each row, how many tokens stand in those before it."""
    return list(itertools.accumulate((len(row) for row in rows), initial=0))[:-1]


def check_counts(**counts: Any) -> None:
    """Refuse numbers of tokens, rows or bytes that are none (ConfigError)."""
    for name, value in counts.items():
        least = 2 if name == "tokens" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} is {value!r}; expected an integer of at least {least}")


def _check_rows(rows: Sequence[Tensor]) -> None:
    if not rows:
        raise ConfigError("rows is empty; calibration needs token ids")
    for index, row in enumerate(rows):
        if row.dim() != 1 or len(row) == 0:
            raise ConfigError(f"rows[{index}] has shape {tuple(row.shape)}; expected a list of token ids")


def target_groups(targets: Sequence[Target], sides: str, max_bytes: int) -> Iterator[list[Target]]:
    """Split layers, in order, into groups whose float64 moments fit into memory together; one alone always fits."""
    group: list[Target] = []
    held = 0
    for target in targets:
        m, n = target.shape
        size = 8 * max(
            n**2, m**2 if sides != "input" else 0
        )  # the two sides are measured one after the other
        if group and held + size > max_bytes:
            yield group
            group, held = [], 0
        group.append(target)
        held += size
    if group:
        yield group


def sampled_rows(
    model: nn.Module, tokens: int, seed: int = 0, store: CalibrationStore | None = None
) -> list[Tensor]:
    """Return about `tokens` token ids in rows, sampled from a base model: those that `calibrate` would measure on."""
    return _sampled(model, store or CalibrationStore(), model_fingerprint(model), tokens, seed)


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


def _run(model: nn.Module, rows: Sequence[Tensor], batch_size: int, what: str) -> None:
    """Run the model over rows of token ids, padded on the right where they differ in length."""
    device = next(model.parameters()).device
    few = {"logits_to_keep": 1} if what == "inputs" and "logits_to_keep" in _accepted(model) else {}
    starts = range(0, len(rows), batch_size)
    for first in tqdm(
        starts, desc=f"calibrating: {what}", unit=" batches", delay=2, leave=False, disable=None
    ):
        batch = rows[first : first + batch_size]
        ids = nn.utils.rnn.pad_sequence(list(batch), batch_first=True).to(device)
        lengths = torch.tensor([len(row) for row in batch], device=device)
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        model(input_ids=ids, attention_mask=mask.long(), use_cache=False, **few)


def _accepted(model: nn.Module) -> Iterable[str]:
    return inspect.signature(model.forward).parameters


def _measure(
    model: nn.Module, modules: Sequence[str], run: Callable[[], Any]
) -> tuple[Bases, dict[str, str]]:
    """Run the model and return each module's basis, and which module it shares it with."""
    collector = MomentCollector(model, modules)
    with collector.watching():
        run()
    return collector.bases(), collector.leader


def _measure_least(model: nn.Module, targets: Sequence[Target], run: Callable[[], Any]) -> Bases:
    collector = MomentCollector(model, module_names(targets))
    with collector.watching():
        run()
    nothing = SecondMoment(1)  # its error says that no token reached the layer
    found: dict[tuple[str, int], MomentBasis] = {}
    for target in targets:
        leader, k = collector.leader.get(target.name, target.name), int(target.k)
        if (leader, k) not in found:
            found[leader, k] = collector.moments.get(leader, nothing).trailing(k, target.name)
    return {target.name: found[collector.leader[target.name], int(target.k)] for target in targets}


def _measure_gradients(
    model: nn.Module, targets: Sequence[Target], run: Callable[[], Any], limit: int
) -> Bases:
    collector = GradientCollector(model, module_names(targets), limit)
    with collector.watching():
        run()
    nothing = SecondMoment(1)  # its error says that no token reached the layer
    return {
        target.name: collector.moments.pop(target.name, nothing).leading(int(target.k), target.name)
        for target in targets
    }
