"""Terms that a training adds to the loss, and losses that replace it, so that less is forgotten.

The base model is the adapted one with its adapter disabled, so it takes no memory of its own.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hiplora.data.encoding import IGNORED
from hiplora.data.texts import ROW_LENGTH, calibration_rows
from hiplora.evaluation.likelihood import eval_mode
from hiplora.training.method import Penalty
from hiplora.training.recipe import TrainRecipe
from hiplora.training.sequences import keeps_rows_apart
from hiplora.tuner import base_only, sampled_rows

EAFT_TOP = 20  # tokens whose entropy EAFT measures
STM_PERPLEXITY = 2.5  # above which STM leaves a token out


class TokenLoss:
    """Cross-entropy with a weight for each token, and KL(base ‖ adapted) on the same tokens without the right one.

    `kind` is "none", "eaft" or "dft" (`token_weights`); `own_kl` is the price of a nat of `kl_without_target`.
    """

    def __init__(self, kind: str, own_kl: float):
        self.kind, self.own_kl = kind, own_kl

    def __call__(self, model: Any, inputs: dict[str, Any], items: Any) -> Tensor:
        """Return the sum over the learned tokens of a batch, divided by `items`."""
        inputs = dict(inputs) | {"use_cache": False}
        target = inputs.pop("labels")[:, 1:]
        learned = target != IGNORED
        target = target[learned]
        logits = model(**inputs).logits[:, :-1][learned].float()
        right = logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]
        loss = -(token_weights(logits.detach(), target, self.kind) * right).sum()
        if self.own_kl:
            unwrapped = getattr(model, "module", model)  # within DDP
            with torch.no_grad(), base_only(unwrapped):
                base = unwrapped(**inputs).logits[:, :-1][learned].float()
            loss = loss + self.own_kl * kl_without_target(base, logits, target).sum()
        return loss / items


def token_weights(logits: Tensor, target: Tensor, kind: str) -> Tensor:
    """Return the weight of each token's cross-entropy: logits (T, vocabulary), targets (T,) → (T,).

    "dft" (arXiv 2508.05629): the probability of the right token. "eaft" (arXiv 2601.02151): the entropy of the 20
    likeliest tokens, as a share of its maximum: where the model is sure of something else, little is learned.
    """
    if kind == "dft":
        return logits.softmax(-1).gather(-1, target[:, None])[:, 0]
    if kind == "eaft":
        top = logits.topk(min(EAFT_TOP, logits.shape[-1])).values.log_softmax(-1)
        return -(top.exp() * top).sum(-1) / math.log(top.shape[-1])
    return torch.ones(len(target), device=target.device)


def kl_without_target(base: Tensor, adapted: Tensor, target: Tensor) -> Tensor:
    """Return KL(base ‖ adapted) in nats without the right token (arXiv 2605.29498): logits, targets → (T,)."""
    p, q = (logits.scatter(-1, target[:, None], -torch.inf).log_softmax(-1) for logits in (base, adapted))
    terms = (p.exp() * (p - q)).scatter(-1, target[:, None], 0.0)  # −∞ on both sides
    return terms.sum(-1)


@torch.no_grad()
def mask_unlikely(model: Any, rows: Sequence[dict[str, list[int]]]) -> int:
    """Remove the tokens from the labels whose perplexity under the bare model is above 2.5 (STM, arXiv 2501.14315).

    Returns how many were removed.
    """
    removed = 0
    for row in rows:
        ids = torch.tensor(row["input_ids"], device=model.device)
        logits = model(ids[None], use_cache=False).logits[0, :-1].float()
        probabilities = logits.softmax(-1).gather(-1, ids[1:, None])[:, 0]
        for position, probability in enumerate(probabilities.tolist(), 1):
            if row["labels"][position] != IGNORED and probability < 1 / STM_PERPLEXITY:
                row["labels"][position] = IGNORED
                removed += 1
    return removed


def replay_rows(model: Any, rows: int, max_length: int) -> list[dict[str, list[int]]]:
    """Return rows that the bare model writes itself, learned whole (self-replay)."""
    sampled = [row[:max_length].tolist() for row in sampled_rows(model, rows * ROW_LENGTH)[:rows]]
    return [{"input_ids": row, "labels": row} for row in sampled]


class KlOnText:
    """KL(base ‖ adapted), mean per token in nats, on some tokens of a text, chosen by seed and step.

    Both models run in eval mode, so no random number is drawn that training would miss.
    """

    def __init__(self, rows: Sequence[Tensor], tokens: int, seed: int, together: bool = True):
        self._together = together  # in one sequence, where the model keeps the pieces apart
        self._tokens, self._seed = tokens, seed
        length = min(max(map(len, rows)), tokens)
        self._pieces = [piece for row in rows for piece in row.split(length)]
        self._count = -(-tokens // length)

    def batch(self, step: int) -> list[Tensor]:
        """Return the pieces of text of a step, at most `tokens` tokens, in an order drawn anew in each pass."""
        pieces, remaining = [], self._tokens
        for number in range(step * self._count, (step + 1) * self._count):
            epoch, index = divmod(number, len(self._pieces))
            generator = torch.Generator().manual_seed((self._seed * 0x9E3779B1 + epoch) % 2**32)
            order = torch.randperm(len(self._pieces), generator=generator)
            pieces.append(self._pieces[int(order[index])][:remaining])
            remaining -= len(pieces[-1])
        return pieces

    def __call__(self, model: Any, step: int) -> Tensor:
        """Return the divergence, with gradients to the adapter only."""
        pieces = self.batch(step)
        with eval_mode(model):
            with torch.no_grad(), base_only(model):
                base = self._log_probs(model, pieces)
            adapted = self._log_probs(model, pieces)
        return F.kl_div(adapted, base, reduction="sum", log_target=True) / len(base)

    def _log_probs(self, model: Any, pieces: list[Tensor]) -> Tensor:
        inputs = [{"input_ids": piece[None].to(model.device)} for piece in pieces]
        if self._together:
            positions = torch.cat([torch.arange(len(piece)) for piece in pieces])
            ids = torch.cat(pieces)
            inputs = [{"input_ids": ids[None].to(model.device), "position_ids": positions[None].to(model.device)}]
        logits = torch.cat([model(**row, use_cache=False).logits[0] for row in inputs])
        return F.log_softmax(logits.float(), dim=-1)


def kl_penalty(recipe: TrainRecipe, model: nn.Module, tokenizer: Any) -> Penalty | None:
    """Return the penalty of a recipe, if any; `model` is bare, and text is sampled from it if none is named."""
    settings = recipe.train
    if not settings.kl_weight:
        return None
    text, pool = settings.kl_text, settings.kl_pool
    rows = sampled_rows(model, pool) if text is None else calibration_rows(tokenizer, text, pool, model)
    value = KlOnText(rows, settings.kl_tokens, recipe.seed, keeps_rows_apart(model))
    return Penalty("kl", settings.kl_weight, value)
