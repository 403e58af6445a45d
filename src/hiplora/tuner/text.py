"""The text that a model is calibrated on: given, or sampled from the model itself; and what was measured on it."""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hiplora.errors import ConfigError
from hiplora.spectral import MomentBasis
from hiplora.tuner.moments import Bases, measure_inputs, measure_outputs
from hiplora.tuner.sampling import OWN_DATA, CalibrationStore, model_fingerprint, sampled_rows
from hiplora.tuner.targets import Target, linear_target

Rows = Sequence[Sequence[int] | Tensor] | Tensor | None


def check_counts(**counts: Any) -> None:
    """Check that numbers of tokens, rows or bytes are positive integers (ConfigError)."""
    for name, value in counts.items():
        least = 2 if name == "tokens" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} is {value!r}; expected an integer of at least {least}")


def memory_groups(targets: Iterable[Target], sides: str, max_bytes: int) -> Iterator[list[Target]]:
    """Split layers, in order, into groups whose float64 moments fit into memory together; one alone always fits."""
    group: list[Target] = []
    held = 0
    for target in targets:
        m, n = target.shape
        size = 8 * (n**2 if sides == "input" else max(m, n) ** 2)  # the sides are measured one after the other
        if group and held + size > max_bytes:
            yield group
            group, held = [], 0
        group.append(target)
        held += size
    if group:
        yield group


class CalibrationText:
    """What a model is calibrated on, rows of tokens or a loop of the user's, and the store of what is measured on it.

    `key` identifies model and rows; it is empty for a loop, of which nothing is stored.
    """

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
        """Take `rows` of token ids, of any length, or sample about `tokens` from the model.

        `batch_size` rows are run at a time; `seed` is the sampling's; layers whose moments exceed `max_bytes` together
        are measured in several passes; `store` keeps sampled text and measurements, by default in the cache.
        `run_model` runs the model over data of its own instead. `tokenizer` is for the conversations in sampled text.

        Raises:
            ConfigError: an argument makes no sense, or text cannot be sampled from this model.
        """
        check_counts(tokens=tokens, batch_size=batch_size, max_bytes=max_bytes)
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
            _check_runs(model)
        if not self.rows:
            raise ConfigError("rows is empty; calibration needs token ids")
        vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
        digest = hashlib.sha256(identity.encode())
        for index, row in enumerate(self.rows):
            if row.dim() != 1 or len(row) == 0:
                raise ConfigError(f"rows[{index}] has shape {tuple(row.shape)}; expected a list of token ids")
            if vocabulary is not None and not 0 <= int(row.min()) <= int(row.max()) < vocabulary:
                raise ConfigError(
                    f"rows[{index}] has token ids from {row.min()} to {row.max()}, and the model's vocabulary has "
                    f"{vocabulary}; encode the text with the model's own tokenizer"
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
        targets = (linear_target(self._model.get_submodule(name), name) for name in modules)
        for group in memory_groups(targets, "input", self._max_bytes):
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
        few = -(-self._batch_size // 2)  # a backward pass holds all activations
        run = self._run_model or functools.partial(_run, self._model, rows, few, "gradients")
        measure = functools.partial(measure_outputs, self._model, ranks, run, limit)
        return self._stored(["outputs", self.key, limit, list(ranks.items())], measure)

    def _stored(self, key: list[Any], measure: Callable[[], Bases]) -> Bases:
        """Return the stored measurement, or measure and store it; a basis that layers share is stored once."""
        if not self.key:
            return measure()

        def make() -> tuple[dict[str, Tensor], Any]:
            bases = measure()
            first: dict[int, str] = {}
            leader = {name: first.setdefault(id(basis), name) for name, basis in bases.items()}
            parts = ("values", "vectors")
            tensors = {f"{n}.{part}": getattr(bases[n], part) for n in first.values() for part in parts}
            return tensors, {"leader": leader, "tokens": min(basis.tokens for basis in bases.values())}

        tensors, record = self._store.get_or_make(self._store.path(*key), make)
        led = {
            name: MomentBasis(tensors[f"{name}.values"], tensors[f"{name}.vectors"], record["tokens"])
            for name in set(record["leader"].values())
        }
        return {name: led[leader] for name, leader in record["leader"].items()}


def _check_runs(model: Any) -> None:
    """Check that a model runs on rows of token ids and nothing else (ConfigError)."""
    accepted = inspect.signature(model.forward).parameters
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) or "input_ids" not in accepted:
        raise ConfigError(f"{type(model).__name__} does not run on rows of token ids alone; {OWN_DATA}")


def _run(model: nn.Module, rows: Sequence[Tensor], batch_size: int, what: str, head: bool = True) -> None:
    """Run the model over rows of token ids, padded on the right where they differ in length."""
    device = next(model.parameters()).device
    accepted = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": False, **({} if head else {"logits_to_keep": 1})}
    starts = range(0, len(rows), batch_size)
    for first in tqdm(starts, desc=f"calibrating: {what}", unit=" batches", delay=2, leave=False, disable=None):
        batch = rows[first : first + batch_size]
        ids = nn.utils.rnn.pad_sequence(list(batch), batch_first=True).to(device)
        lengths = torch.tensor([len(row) for row in batch], device=device)
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        given = {"attention_mask": mask.long(), **options}
        model(input_ids=ids, **{name: value for name, value in given.items() if name in accepted})
