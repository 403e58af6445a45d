"""The price of answering unlike the base model on other text: KL(base ‖ adapted) per token, once a step.

The text is the base model's own unless one is named: what a model would write is what it knows. The base model is
the adapted one with its adapter switched off, so it takes no memory of its own.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hiplora.recipes import TrainRecipe
from hiplora.training.calibration import calibration_rows
from hiplora.tuner.inputs import sampled_rows


class KlPenalty:
    """KL(base ‖ adapted), mean per token in nats, on some tokens of a text; which, depends on seed and step alone.

    Both models run in evaluation mode: nothing is dropped, and no random number is drawn that training would miss.
    """

    name = "kl"

    def __init__(self, rows: Sequence[Tensor], weight: float, tokens: int, seed: int):
        """Take rows of token ids, what a nat costs, how many tokens a step reads, and the seed of their order."""
        self.weight = weight
        self._tokens, self._seed = tokens, seed
        length = min(max(map(len, rows)), tokens)
        self._pieces = [piece for row in rows for piece in row.split(length)]
        self._count = -(-tokens // length)

    def batch(self, step: int) -> list[Tensor]:
        """Return the pieces of text of a step, at most so many tokens as were asked for."""
        first = step * self._count
        drawn = [self._drawn(place) for place in range(first, first + self._count)]
        before = itertools.accumulate((len(piece) for piece in drawn), initial=0)
        return [piece[: self._tokens - used] for piece, used in zip(drawn, before, strict=False)]

    def __call__(self, model: Any, step: int) -> Tensor:
        """Return the divergence, with its gradient through the adapted model only."""
        pieces = self.batch(step)
        inputs = {
            "input_ids": torch.cat(pieces)[None].to(model.device),
            "position_ids": torch.cat([torch.arange(len(piece)) for piece in pieces])[None].to(model.device),
        }
        with _evaluating(model):
            with torch.no_grad(), _switched_off(model):
                base = F.log_softmax(model(**inputs, use_cache=False).logits[0].float(), dim=-1)
            adapted = F.log_softmax(model(**inputs, use_cache=False).logits[0].float(), dim=-1)
        return F.kl_div(adapted, base, reduction="sum", log_target=True) / len(base)

    def _drawn(self, place: int) -> Tensor:
        """Return the piece at a place of the endless order: every piece once in each pass, each pass shuffled anew."""
        lap, index = divmod(place, len(self._pieces))
        generator = torch.Generator().manual_seed((self._seed * 0x9E3779B1 + lap) % 2**32)
        return self._pieces[int(torch.randperm(len(self._pieces), generator=generator)[index])]


def kl_penalty(recipe: TrainRecipe, model: nn.Module, tokenizer: Any) -> KlPenalty | None:
    """Return the penalty that a recipe asks for, if any; text that none is named for is sampled from the bare model.

    Raises:
        DataError: the text cannot be read.
    """
    settings = recipe.train
    if not settings.kl_weight:
        return None
    if settings.kl_text is None:
        rows = sampled_rows(model, settings.kl_pool)
    else:
        rows = calibration_rows(tokenizer, settings.kl_text, settings.kl_pool)
    return KlPenalty(rows, settings.kl_weight, settings.kl_tokens, recipe.seed)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _switched_off(model: Any) -> Iterator[None]:
    """Have the base model; PEFT decides anew what is trained when it switches an adapter on again, so that is kept."""
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in trained.items():
            parameter.requires_grad_(flag)
