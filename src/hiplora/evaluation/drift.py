"""How far an adapter moved a model from its base on text: KL divergence per token, and the ratio of perplexities."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hiplora.errors import AdapterError, DataError

AdapterOff = Callable[[], contextlib.AbstractContextManager]
Texts = Mapping[str, str | Sequence[str]]  # name → a text, or documents that are read apart

_CHUNK = 128  # positions whose whole distributions are in work at once


@dataclass(frozen=True)
class Drift:
    """Drift on one text.

    `kl` is the mean over positions of KL(base‖adapted) of the next token, in nats; `perplexity_ratio` is
    exp(mean NLL adapted − mean NLL base) on the same positions, above 1 where the text became less likely;
    `tokens` is the number of positions.
    """

    kl: float
    perplexity_ratio: float
    tokens: int

    def as_dict(self) -> dict[str, float]:
        """Return the record for a results file."""
        return asdict(self)


@dataclass
class BaseReference:
    """Windows of named texts, and what the bare base model makes of them, to hold several adapters against.

    Log-probabilities are kept while they fit into `cache_bytes` and computed again (with the adapter off)
    where they do not.
    """

    windows: dict[str, list[Int[Tensor, " length"]]]
    cache_bytes: int = 1 << 30
    _kept: dict[tuple[str, int], Float[Tensor, "positions vocabulary"]] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        model: nn.Module,
        tokenizer: Any,
        texts: Texts,
        *,
        window: int = 512,
        max_tokens: int = 1024,
        cache_bytes: int = 1 << 30,
    ) -> "BaseReference":
        """Run the bare `model` over `texts`, `max_tokens` of each in windows of `window` tokens; of documents, the
        first window of each.

        Raises:
            DataError: a text has fewer than two tokens, or `window` or `max_tokens` is below 2.
        """
        reference = cls(cut_windows(tokenizer, texts, window, max_tokens), cache_bytes)
        for name, windows in reference.windows.items():
            for index, ids in enumerate(windows):
                reference.keep(name, index, _log_probs(model, ids))
        return reference

    def keep(self, name: str, index: int, log_probs: Tensor) -> None:
        """Store the base's log-probabilities of a window; the first window of each text always, for the check."""
        held = sum(tensor.nbytes for tensor in self._kept.values())
        if index == 0 or held + log_probs.nbytes <= self.cache_bytes:
            self._kept[name, index] = log_probs

    def get(self, name: str, index: int) -> Float[Tensor, "positions vocabulary"] | None:
        """Return the base's log-probabilities of a window, or None where they were not kept."""
        return self._kept.get((name, index))


def measure_drift(
    model: nn.Module,
    reference: BaseReference,
    adapter_off: AdapterOff | None = None,
    *,
    may_be_nothing: bool = False,
) -> dict[str, Drift]:
    """Measure how far `model`, with its adapter on, is from the base of `reference`, text by text.

    `adapter_off` is a context manager that restores the base (default: the model's own `disable_adapter`).
    `may_be_nothing` accepts an adapter that changes no logit, for one that was made to change less.

    Raises:
        AdapterError: with the adapter off the logits are not the base's bit for bit, or with it on they are,
            on every text: the figures would mean nothing.
    """
    off: AdapterOff = adapter_off or model.disable_adapter  # type: ignore[assignment]
    _check_base_restored(model, reference, off)
    results, moved = {}, False
    for name, windows in reference.windows.items():
        kl = nll_change = 0.0
        tokens = 0
        for index, ids in enumerate(windows):
            base = reference.get(name, index)
            if base is None:
                with off():
                    base = _log_probs(model, ids)
            adapted = _log_probs(model, ids)
            moved = moved or not torch.equal(base, adapted)
            kl += _kl_sum(base, adapted)
            nll_change += _next_token_change(base, adapted, ids)
            tokens += len(ids) - 1
        results[name] = Drift(kl / tokens, math.exp(nll_change / tokens), tokens)
    if not moved and not may_be_nothing:
        raise AdapterError(
            "the adapter changes no logit on any text: it is not active or was never trained; "
            "check that it is loaded and that training took steps at a learning rate above 0"
        )
    return results


def cut_windows(
    tokenizer: Any, texts: Texts, window: int, max_tokens: int
) -> dict[str, list[Int[Tensor, " length"]]]:
    """Cut texts into windows of at most `window` tokens, `max_tokens` of each text in all; of documents, one each.

    Each window starts with the tokenizer's beginning-of-text token where it uses one.

    Raises:
        DataError: see `BaseReference.build`.
    """
    if window < 2 or max_tokens < 2:
        raise DataError(f"drift windows of {window} tokens, {max_tokens} in all; expected at least 2 of both")
    bos = _beginning(tokenizer)
    cut = {}
    width = window - len(bos)
    for name, text in texts.items():
        whole = isinstance(text, str)
        parts = [text] if isinstance(text, str) else text
        rows = [
            row for part in parts for row in _rows(tokenizer, part, width, max_tokens if whole else width)
        ]
        cut[name] = [torch.tensor(bos + row) for row in rows if len(bos) + len(row) >= 2]
        if not cut[name]:
            raise DataError(f"text {name!r} has {sum(map(len, rows))} tokens; drift needs at least 2")
    return cut


def _rows(tokenizer: Any, text: str, width: int, max_tokens: int) -> list[list[int]]:
    # verbose=False: a text longer than the model's context is no mistake here, it is cut.
    ids = tokenizer(text[: 64 * max_tokens], add_special_tokens=False, verbose=False)["input_ids"][
        :max_tokens
    ]
    return [ids[i : i + width] for i in range(0, len(ids), width)]


@torch.no_grad()
def _log_probs(model: nn.Module, ids: Int[Tensor, " length"]) -> Float[Tensor, "positions vocabulary"]:
    """Log-probabilities (fp32) of the next token at every position but the last, dropout off."""
    training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        logits = model(input_ids=ids[None].to(device), use_cache=False).logits[0, :-1]
        if logits.dtype != torch.float32:
            logits = logits.float()
        for first in range(
            0, len(logits), _CHUNK
        ):  # in place: the whole softmax at once would double the peak
            logits[first : first + _CHUNK] = logits[first : first + _CHUNK].log_softmax(-1)
        return logits
    finally:
        model.train(training)


def _kl_sum(base: Tensor, adapted: Tensor) -> float:
    """Sum over positions of KL(base‖adapted), accumulated in float64."""
    total = 0.0
    for first in range(0, len(base), _CHUNK):
        p, q = base[first : first + _CHUNK], adapted[first : first + _CHUNK]
        total += torch.sum(p.exp() * (p - q), dtype=torch.float64).item()
    return total


def _next_token_change(base: Tensor, adapted: Tensor, ids: Tensor) -> float:
    """Sum over positions of how many nats less likely the token that really follows became."""
    target = ids[1:, None].to(base.device)
    return (base.gather(1, target) - adapted.gather(1, target)).sum(dtype=torch.float64).item()


def _check_base_restored(model: nn.Module, reference: BaseReference, off: AdapterOff) -> None:
    name, windows = next(iter(reference.windows.items()))
    with off():
        restored = _log_probs(model, windows[0])
    base = reference.get(name, 0)
    if base is None or not torch.equal(restored, base):
        raise AdapterError(
            f"with the adapter off the model is not the base bit for bit (text {name!r}); "
            "the base weights were changed, or another base was loaded"
        )


def _beginning(tokenizer: Any) -> list[int]:
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("x")["input_ids"][0] == bos else []
