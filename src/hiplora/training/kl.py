"""A penalty on KL(base ‖ adapted) per token, measured once a step on other text.

The text is sampled from the base model unless one is named. The base model is the adapted one with its adapter
disabled, so it takes no memory of its own.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hiplora.data.texts import calibration_rows
from hiplora.training.method import Penalty
from hiplora.training.recipe import TrainRecipe
from hiplora.tuner import sampled_rows


class KlPenalty(Penalty):
    """KL(base ‖ adapted), mean per token in nats, on some tokens of a text, chosen by seed and step.

    Both models run in eval mode, so no random number is drawn that training would miss.
    """

    name = "kl"

    def __init__(self, rows: Sequence[Tensor], weight: float, tokens: int, seed: int):
        self.weight = weight
        self._tokens, self._seed = tokens, seed
        length = min(max(map(len, rows)), tokens)
        self._pieces = [piece for row in rows for piece in row.split(length)]
        self._count = -(-tokens // length)

    def batch(self, step: int) -> list[Tensor]:
        """Return the pieces of text of a step, at most `tokens` tokens, in an order drawn anew in each pass."""
        pieces, left = [], self._tokens
        for place in range(step * self._count, (step + 1) * self._count):
            lap, index = divmod(place, len(self._pieces))
            generator = torch.Generator().manual_seed((self._seed * 0x9E3779B1 + lap) % 2**32)
            order = torch.randperm(len(self._pieces), generator=generator)
            pieces.append(self._pieces[int(order[index])][:left])
            left -= len(pieces[-1])
        return pieces

    def __call__(self, model: Any, step: int) -> Tensor:
        """Return the divergence, with gradients to the adapter only."""
        pieces = self.batch(step)
        inputs = {
            "input_ids": torch.cat(pieces)[None].to(model.device),
            "position_ids": torch.cat([torch.arange(len(piece)) for piece in pieces])[None].to(model.device),
        }
        modes = {module: module.training for module in model.modules()}
        model.eval()
        with torch.no_grad(), _disabled(model):
            base = F.log_softmax(model(**inputs, use_cache=False).logits[0].float(), dim=-1)
        adapted = F.log_softmax(model(**inputs, use_cache=False).logits[0].float(), dim=-1)
        for module, mode in modes.items():
            module.training = mode
        return F.kl_div(adapted, base, reduction="sum", log_target=True) / len(base)


def kl_penalty(recipe: TrainRecipe, model: nn.Module, tokenizer: Any) -> KlPenalty | None:
    """Return the penalty of a recipe, if any; `model` is bare, and text is sampled from it if none is named.

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
def _disabled(model: Any) -> Iterator[None]:
    """Disable the adapter; restore what is trainable on exit, since PEFT decides that anew."""
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with model.disable_adapter():
        yield
    for parameter, flag in trainable.items():
        parameter.requires_grad_(flag)
