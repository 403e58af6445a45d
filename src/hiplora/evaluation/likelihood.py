"""How likely a model finds the responses of examples, with logits computed only where a response is."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hiplora.data.encoding import IGNORED
from hiplora.errors import DataError
from hiplora.tuner import restored

LOGITS_BYTES = 1 << 30  # of fp32 logits in memory at once


@dataclass(frozen=True)
class Encoded:
    """One example as tokens; `labels` repeats the ids that are scored and has -100 for the others."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]

    def __post_init__(self) -> None:
        """Raise DataError if nothing is scored."""
        if not self.scored:
            raise DataError(
                f"an example of {len(self.ids)} tokens has none to score; expected a label other than -100 after the "
                "first token"
            )

    @property
    def scored(self) -> list[int]:
        """Positions of the scored tokens; the first token of a sequence is never predicted."""
        return [i for i, label in enumerate(self.labels) if i and label != IGNORED]


def encode(tokenizer: Any, prompt: str, response: str) -> Encoded:
    """Tokenize a completion; everything from the first token in which prompt and whole text differ is scored.

    No end-of-text token is added: the response need not be all that follows. DataError if the response adds no token,
    or there is nothing before it.
    """
    whole, context = (
        without_end(tokenizer, text, tokenizer(text)["input_ids"]) for text in (prompt + response, prompt)
    )
    common = min(len(whole), len(context))
    start = next((i for i in range(common) if whole[i] != context[i]), common)
    return Encoded(tuple(whole), tuple([IGNORED] * start + whole[start:]))


def without_end(tokenizer: Any, text: str, ids: Sequence[int]) -> list[int]:
    """Return a text's token ids without the end-of-text token that some tokenizers add."""
    added = ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token)
    return list(ids[:-1] if added else ids)


def response_log_probs(model: nn.Module, batch: Sequence[Encoded]) -> list[Float[Tensor, " scored"]]:
    """Return, per example, the log-probability (nats, fp32) of each scored token given all tokens before it.

    Examples are padded on the left, so that all responses end together and the output head runs over the last
    positions only; in a model that reads its padding they go one by one. Differentiable; gradients and the model's mode
    are the caller's choice.
    """
    if not can_pad(model, [len(example.ids) for example in batch]):
        return [response_log_probs(model, [example])[0] for example in batch]
    device = next(model.parameters()).device
    ids, mask, positions = (tensor.to(device) for tensor in pad_left([example.ids for example in batch]))
    keep = max(len(example.ids) - example.scored[0] for example in batch) + 1
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=keep)
    rows = []
    for example, logits, tokens in zip(batch, output.logits[:, -keep:-1], ids[:, -keep + 1 :], strict=True):
        first = len(example.ids) - keep + 1  # the token of the first column
        columns = torch.tensor(example.scored, device=device) - first
        rows.append(logits[columns].float().log_softmax(-1).gather(1, tokens[columns, None]).squeeze(1))
    return rows


@torch.no_grad()
def score_responses(
    model: nn.Module, examples: Sequence[Encoded], batch_size: int = 8
) -> list[Float[Tensor, " scored"]]:
    """Return `response_log_probs` of any number of examples, in their order, in eval mode."""
    scores: dict[int, Tensor] = {}
    lengths = [len(example.ids) for example in examples]
    vocabulary = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    batch_size = max(1, min(batch_size, LOGITS_BYTES // (4 * vocabulary * max(lengths, default=1))))
    with eval_mode(model):
        for batch in by_length(lengths, batch_size):
            scores |= zip(batch, response_log_probs(model, [examples[index] for index in batch]), strict=True)
    return [scores[index] for index in range(len(examples))]


def heldout_loss(model: nn.Module, examples: Sequence[Encoded], batch_size: int = 8) -> float:
    """Return the mean negative log-likelihood, in nats, over all response tokens of all examples, in eval mode."""
    if not examples:
        raise DataError("there are no held-out examples; hold back a larger share of the data or give more data")
    return -torch.cat(score_responses(model, examples, batch_size)).double().mean().item()


_CAN_PAD: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@torch.no_grad()
def can_pad(model: nn.Module, lengths: Sequence[int]) -> bool:
    """Return whether rows of these lengths may share a batch: of one length, or of a model that ignores padding.

    Recurrent layers may ignore the mask; the padding then changes what follows it.
    """
    if len({*lengths}) < 2:
        return True
    if model not in _CAN_PAD:
        vocabulary: int = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator, assignment]
        row = [token % vocabulary for token in range(16)]
        ids, mask, positions = pad_left([row[:8], row[:8], row])
        ids[1, :8] = vocabulary - 1
        first = next(model.parameters())
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        with eval_mode(model):
            output = model(**{name: tensor.to(first.device) for name, tensor in inputs.items()}, use_cache=False)
        zeros, others, _ = output.logits[:, 8:].float()  # after a padding of zeros, and of other tokens
        tolerance = 1e-3 if first.dtype == torch.float32 else 2e-2
        _CAN_PAD[model] = bool((zeros - others).abs().max() <= tolerance * zeros.abs().max())
    return _CAN_PAD[model]


def pad_left(rows: Sequence[Sequence[int]], token: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return token ids, attention mask and positions, each (rows, longest row); padding is masked."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[token] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def pad_token(tokenizer: Any) -> int:
    """Return the token to pad with: the tokenizer's, else the one that ends a text, else 0."""
    return next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end what a model writes: the tokenizer's, and those that end a chat model's turn."""
    turn_ends: Any = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return {tokenizer.eos_token_id, *(turn_ends if isinstance(turn_ends, (list, tuple)) else [turn_ends])} - {None}


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield batches of indices of items of similar length, so that little is padded."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for first in range(0, len(order), batch_size):
        yield order[first : first + batch_size]


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Have the model in eval mode inside the block, and each of its modules in its own mode afterwards."""
    with restored(model):
        model.eval()
        yield
