"""The text that a model is calibrated on: given, or sampled from the model itself; and what was measured on it."""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from tqdm import tqdm

from hiplora.errors import ConfigError
from hiplora.files import cache_dir
from hiplora.spectral import MomentBasis, TensorStore, weight_fingerprint
from hiplora.tuner.moments import Bases, base_only, measure_inputs, measure_outputs
from hiplora.tuner.targets import Target, linear_target

ROW_LENGTH = 256  # tokens of one calibration row
_SAMPLED_AT_ONCE = 40
_FORMAT = 1  # raised when a measurement changes: old entries are then not found
Rows = Sequence[Sequence[int] | Tensor] | Tensor | None


class CalibrationStore(TensorStore):
    """Sampled text and measured eigenvectors, by the model, the text and the modules; in the user's cache."""

    def __init__(self, root: Path | None = None):
        super().__init__(cache_dir() / "calibration" if root is None else root)

    def path(self, *key: Any) -> Path:
        """Return the file of the entry that is made from `key`."""
        return super().path(_FORMAT, *key)


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
    ):
        """Take `rows` of token ids, of any length, or sample about `tokens` from the model.

        `batch_size` rows are run at a time; `seed` is the sampling's; layers whose moments exceed `max_bytes` together
        are measured in several passes; `store` keeps sampled text and measurements, by default in the cache.
        `run_model` runs the model over data of its own instead.

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
            self.rows = sampled_rows(model, tokens, seed, self._store, identity)
        else:
            self.rows = [torch.as_tensor(row, dtype=torch.long) for row in rows]
        if not self.rows:
            raise ConfigError("rows is empty; calibration needs token ids")
        digest = hashlib.sha256(identity.encode())
        for index, row in enumerate(self.rows):
            if row.dim() != 1 or len(row) == 0:
                raise ConfigError(f"rows[{index}] has shape {tuple(row.shape)}; expected a list of token ids")
            digest.update(len(row).to_bytes(8, "little") + row.cpu().numpy().astype("<i8").tobytes())
        self.key = digest.hexdigest()

    def run(self) -> None:
        """Run the model over the text once; padding is on the right."""
        if self._run_model is not None:
            self._run_model()
        else:
            _run(self._model, self.rows, self._batch_size, "inputs")

    def inputs(self, modules: Sequence[str]) -> Bases:
        """Measure the inputs of some layers."""
        bases: Bases = {}
        for names in self._grouped(modules):
            measure = functools.partial(measure_inputs, self._model, names, self.run)
            bases |= self._stored(["moments", self.key, names], measure)
        return bases

    def trailing(self, ranks: Mapping[str, int]) -> Bases:
        """Measure the directions in which the inputs of some layers have least energy, k of each."""
        bases: Bases = {}
        for names in self._grouped(ranks):
            group = {name: ranks[name] for name in names}
            measure = functools.partial(measure_inputs, self._model, names, self.run, group)
            bases |= self._stored(["trailing", self.key, list(group.items())], measure)
        return bases

    def outputs(self, ranks: Mapping[str, int], limit: int) -> Bases:
        """Measure which outputs of some layers matter: k directions of each, on `limit` tokens."""
        before = itertools.accumulate((len(row) for row in self.rows), initial=0)
        rows = [row for row, total in zip(self.rows, before, strict=False) if total < limit]
        few = -(-self._batch_size // 2)  # a backward pass holds all activations
        run = self._run_model or functools.partial(_run, self._model, rows, few, "gradients")
        measure = functools.partial(measure_outputs, self._model, ranks, run, limit)
        return self._stored(["outputs", self.key, limit, list(ranks.items())], measure)

    def _grouped(self, modules: Iterable[str]) -> Iterator[list[str]]:
        targets = (linear_target(self._model.get_submodule(name), name) for name in modules)
        for group in memory_groups(targets, "input", self._max_bytes):
            yield [target.name for target in group]

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


def model_fingerprint(model: nn.Module) -> str:
    """Return a hash of the values of all of a model's own weights; adapters on it do not count."""
    digest, seen = hashlib.sha256(), set()
    for name, parameter in model.named_parameters():
        if any(part.startswith(("hiplora_", "lora_", "modules_to_save")) for part in name.split(".")):
            continue
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        digest.update(f"{name.replace('.base_layer', '')} {weight_fingerprint(parameter)}\n".encode())
    return digest.hexdigest()


def sampled_rows(
    model: Any, tokens: int, seed: int = 0, store: CalibrationStore | None = None, identity: str = ""
) -> list[Tensor]:
    """Return about `tokens` token ids in rows, sampled from the base model: those that `calibrate` measures on.

    What was sampled before is read from `store`, by default the cache; `identity` is the `model_fingerprint`, if known.

    Raises:
        ConfigError: the model is not a causal language model.
    """
    config = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False) or not model.can_generate():
        raise ConfigError(
            f"{type(model).__name__} is not a causal language model, so no calibration text can be sampled from it; "
            "call hiplora.calibrate(model, config, run_model=...) on data of yours, or set basis='weight'"
        )
    store, identity = store or CalibrationStore(), identity or model_fingerprint(model)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    length = min(ROW_LENGTH, limit or ROW_LENGTH, tokens)
    count = -(-tokens // length)
    rows: list[Tensor] = []
    with base_only(model):
        for first in range(0, count, _SAMPLED_AT_ONCE):
            part = range(first, min(first + _SAMPLED_AT_ONCE, count))
            path = store.path("sample", identity, length, seed, part.start, part.stop)
            sample = functools.partial(sample_rows, model, part, length, seed)
            made, _ = store.get_or_make(path, lambda sample=sample: ({"rows": sample().int()}, {}))  # type: ignore[misc]
            rows.extend(made["rows"].long())
    return rows


@torch.no_grad()
def sample_rows(model: nn.Module, rows: range, length: int, seed: int = 0) -> Int[Tensor, "rows length"]:
    """Sample rows of token ids from a causal language model, at temperature 1, each begun by a random token.

    A row depends on the model, the seed and its own number only, not on the rows sampled with it or on the device: its
    random numbers are its own (Gumbel-max sampling). Tokens that end a text are not drawn, so every row has `length`
    tokens.
    """
    text_config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    vocabulary, begin = text_config.vocab_size, text_config.bos_token_id
    allowed = torch.ones(vocabulary, dtype=torch.bool)
    allowed[[token for token in special_tokens(model) if token < vocabulary]] = False
    # torch's generator takes 32 bits of a seed; the multiplier is odd, so seeds share no run of rows.
    generators = [torch.Generator().manual_seed((seed * 0x9E3779B1 + row) % 2**32) for row in rows]
    choices = allowed.nonzero().flatten()
    first = torch.stack([choices[torch.randint(len(choices), (1,), generator=g)] for g in generators])
    ids = first if begin is None else torch.cat([torch.full_like(first, begin), first], dim=1)
    device = next(model.parameters()).device
    step, cache = ids, None
    for _ in tqdm(range(ids.shape[1], length), desc="sampling", delay=2, leave=False, disable=None):
        output = model(input_ids=step.to(device), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.logits[:, -1, :vocabulary].float().cpu()
        noise = torch.stack([torch.empty(vocabulary).exponential_(generator=g) for g in generators])
        step = (logits - noise.log()).masked_fill(~allowed, -torch.inf).argmax(-1, keepdim=True)
        ids = torch.cat([ids, step], dim=1)
    return ids[:, :length]


def special_tokens(model: Any) -> list[int]:
    """Return the ids of the tokens that begin, end or pad a text, as the model's configurations name them."""
    found: set[int] = set()
    for config in (model.config.get_text_config(), getattr(model, "generation_config", None)):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(config, name, None)
            found.update(value if isinstance(value, (list, tuple)) else [value] if value is not None else [])
    return sorted(found)


def _run(model: nn.Module, rows: Sequence[Tensor], batch_size: int, what: str) -> None:
    """Run the model over rows of token ids, padded on the right where they differ in length."""
    device = next(model.parameters()).device
    accepted = inspect.signature(model.forward).parameters
    few = {"logits_to_keep": 1} if what == "inputs" and "logits_to_keep" in accepted else {}
    starts = range(0, len(rows), batch_size)
    for first in tqdm(starts, desc=f"calibrating: {what}", unit=" batches", delay=2, leave=False, disable=None):
        batch = rows[first : first + batch_size]
        ids = nn.utils.rnn.pad_sequence(list(batch), batch_first=True).to(device)
        lengths = torch.tensor([len(row) for row in batch], device=device)
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        model(input_ids=ids, attention_mask=mask.long(), use_cache=False, **few)
