"""How far an adapter moved a model from its base on text: KL divergence, perplexity ratio and greedy tokens changed."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hiplora.data.texts import token_rows
from hiplora.errors import AdapterError, DataError
from hiplora.evaluation.likelihood import eval_mode
from hiplora.positions import context_length
from hiplora.tuner.experts import UnrolledExperts

Texts = Mapping[str, str | Sequence[str]]  # name → a text, or separate documents
Windows = dict[str, list[Int[Tensor, " length"]]]

DIVERGED = "its training diverged, or it is for another base: use an earlier checkpoint"
_KEPT = 1 << 30  # bytes of the base's log-probabilities in memory
_CHUNK = 128  # positions whose whole distributions are in memory at once


@dataclass(frozen=True)
class Drift:
    """Drift on one text, over its positions (`tokens` of them).

    `kl` is the mean KL(base‖adapted) of the next token, in nats; `perplexity_ratio` is exp(mean NLL adapted − mean NLL
    base), above 1 where the text became less likely; `greedy_changed` is the share of positions, in [0, 1], whose most
    likely next token is another.
    """

    kl: float
    perplexity_ratio: float
    tokens: int
    greedy_changed: float

    def as_dict(self) -> dict[str, float]:
        """Return the record for a results file."""
        return asdict(self)


@dataclass
class BaseReference:
    """Windows of named texts and the bare base model's predictions on them, to compare several adapters with.

    Log-probabilities are `kept` up to 1 GiB, by text and window, and computed again, with the adapter off, beyond that.
    """

    windows: Windows
    kept: dict[tuple[str, int], Float[Tensor, "positions vocabulary"]] = field(default_factory=dict)

    @classmethod
    def build(
        cls, model: nn.Module, tokenizer: Any, texts: Texts, *, window: int = 512, max_tokens: int = 1024
    ) -> "BaseReference":
        """Run the bare `model` over `texts`, cut as in `cut_windows`, but into windows no longer than its context."""
        reference = cls(cut_windows(tokenizer, texts, min(window, context_length(model) or window), max_tokens))
        kept_bytes = 0
        for name, parts in reference.windows.items():
            for index, ids in enumerate(parts):
                log_probs = _log_probs(model, ids)
                kept_bytes += log_probs.nbytes
                # The first window of each text is always kept: the check that the base comes back needs it.
                if index == 0 or kept_bytes <= _KEPT:
                    reference.kept[name, index] = log_probs
        return reference


def rounding(model: nn.Module) -> float:
    """Return the divergence in nats per token below which it is the rounding of the model's precision."""
    return 1e-6 if next(model.parameters()).dtype == torch.float32 else 1e-3


def measure_drift(
    model: nn.Module,
    reference: BaseReference,
    adapter_off: Callable[[], contextlib.AbstractContextManager] | None = None,
    *,
    may_be_nothing: bool = False,
) -> dict[str, Drift]:
    """Measure how far `model`, with its adapter on, is from the base of `reference`, for each text.

    `adapter_off` is a context manager that restores the base (default: the model's own `disable_adapter`). AdapterError
    if with the adapter off the logits are not the base's bit for bit, but for the rounding of experts that HiP-LoRA
    adapts one by one, or if with it on they are (unless it `may_be_nothing`).
    """
    off: Callable = adapter_off or model.disable_adapter  # type: ignore[assignment]
    first, windows = next(iter(reference.windows.items()))
    with off():
        restored = _log_probs(model, windows[0])
    kept, bare = reference.kept, reference.kept[first, 0]
    same = torch.equal(restored, bare)
    if not same and any(isinstance(module, UnrolledExperts) for module in model.modules()):
        kept = {}  # experts round differently one by one and all at once, which is no drift
        same = bool(_sums(bare, restored, windows[0])[0] <= rounding(model) * len(bare))
    if not same:
        raise AdapterError(
            f"with the adapter off the model is not the base bit for bit (text {first!r}); "
            "the base weights were changed, or another base was loaded"
        )
    results, moved = {}, may_be_nothing
    for name, windows in reference.windows.items():
        sums, tokens = torch.zeros(3, dtype=torch.float64), sum(len(ids) - 1 for ids in windows)
        for index, ids in enumerate(windows):
            base = kept.get((name, index))
            if base is None:
                with off():
                    base = _log_probs(model, ids)
            adapted = _log_probs(model, ids)
            moved = moved or not torch.equal(base, adapted)
            sums += _sums(base, adapted, ids)
        kl, nll_change, changed = (sums / tokens).tolist()
        if not math.isfinite(kl + nll_change):
            raise AdapterError(f"the adapter makes the model's logits NaN or Inf on the text {name!r}; {DIVERGED}")
        results[name] = Drift(kl, math.exp(min(nll_change, 700.0)), tokens, changed)  # no float holds exp(710)
    if not moved:
        raise AdapterError(
            "the adapter changes no logit on any text: it is not active or was never trained; "
            "check that it is loaded and that training took steps at a learning rate above 0"
        )
    return results


def cut_windows(tokenizer: Any, texts: Texts, window: int, max_tokens: int) -> Windows:
    """Cut texts into windows of at most `window` tokens, `max_tokens` of each text in all; of documents, one each.

    Each window starts with the tokenizer's beginning-of-text token where it uses one. DataError if a text, `window` or
    `max_tokens` is below two tokens.
    """
    if window < 2 or max_tokens < 2:
        raise DataError(f"drift windows of {window} tokens, {max_tokens} in all; expected at least 2 of both")
    cut = {}
    for name, text in texts.items():
        if isinstance(text, str):
            rows = token_rows(tokenizer, text, max_tokens, window)
        else:
            rows = [row for part in text for row in token_rows(tokenizer, part, window, window)[:1]]
        cut[name] = [torch.tensor(row) for row in rows if len(row) >= 2]
        if not cut[name]:
            raise DataError(f"text {name!r} has {sum(map(len, rows))} tokens; drift needs at least 2")
    return cut


@torch.no_grad()
def _log_probs(model: nn.Module, ids: Int[Tensor, " length"]) -> Float[Tensor, "positions vocabulary"]:
    """Return log-probabilities (fp32) of the next token at every position but the last, in eval mode."""
    device = next(model.parameters()).device
    with eval_mode(model):
        logits = model(input_ids=ids[None].to(device), use_cache=False).logits[0, :-1].float()
    for part in logits.split(_CHUNK):  # in place: the whole softmax at once would double the peak
        part.copy_(part.log_softmax(-1))
    return logits


def _sums(base: Tensor, adapted: Tensor, ids: Tensor) -> Float[Tensor, " three"]:
    """Return sums over positions, in fp64: KL(base‖adapted), increase in NLL, changes of the likeliest token."""
    target = ids[1:, None].to(base.device)
    sums = torch.zeros(3, dtype=torch.float64)
    for p, q, token in zip(base.split(_CHUNK), adapted.split(_CHUNK), target.split(_CHUNK), strict=True):
        sums[0] += torch.sum(p.exp() * (p - q), dtype=torch.float64).item()
        sums[1] += (p.gather(1, token) - q.gather(1, token)).sum(dtype=torch.float64).item()
        sums[2] += (p.argmax(-1) != q.argmax(-1)).sum().item()
    return sums
