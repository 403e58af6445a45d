"""Ask a model many short prompts: in batches of similar length, logits only where an answer stands."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from hiplora.errors import ConfigError
from hiplora.evaluation.likelihood import Encoded, encode, pad_left, response_log_probs

BATCH_SIZE = 64
EXTRA_TOKENS = 3  # written beyond the longest answer, so that a match is seen to end there


@contextlib.contextmanager
def asking(model: nn.Module) -> Iterator[None]:
    """Have the model in evaluation mode and without gradients inside the block; its mode is put back."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def answer_log_probs(
    model: nn.Module, tokenizer: Any, pairs: Sequence[tuple[str, str]], batch_size: int = BATCH_SIZE
) -> list[float]:
    """Return log p(answer | prompt) of each `(prompt, answer)` in nats, summed over the answer's tokens.

    The answer follows the prompt after one space. The order of `pairs` and the batch size change the values by
    rounding only.

    Raises:
        ConfigError: `batch_size` is below 1.
        DataError: an answer adds no token.
    """
    rows = [encode(tokenizer, prompt, f" {answer}") for prompt, answer in pairs]
    values = [0.0] * len(rows)
    with asking(model):
        for batch in _by_length([len(row.ids) for row in rows], batch_size):
            found = response_log_probs(model, [rows[index] for index in batch])
            sums = torch.stack([row.double().sum() for row in found]).tolist()
            for index, value in zip(batch, sums, strict=True):
                values[index] = value
    return values


def continuations(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], length: int, batch_size: int = BATCH_SIZE
) -> list[str]:
    """Return what the model writes greedily after each prompt, `length` tokens, without special tokens.

    Raises:
        ConfigError: `batch_size` is below 1.
    """
    rows = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    written = [""] * len(rows)
    with asking(model):
        for batch in _by_length([len(row) for row in rows], batch_size):
            texts = _write(model, tokenizer, [rows[index] for index in batch], length)
            for index, text in zip(batch, texts, strict=True):
                written[index] = text
    return written


def answer_length(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> int:
    """Return how many tokens to write so that each of these answers, and a little more, has room."""
    rows: list[Encoded] = [encode(tokenizer, prompt, f" {answer}") for prompt, answer in pairs]
    return max(len(row.scored) for row in rows) + EXTRA_TOKENS


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Return the tokens before an answer, the same as the likelihoods are conditioned on."""
    encoded = encode(tokenizer, prompt, " x")
    return list(encoded.ids[: encoded.scored[0]])


def _write(model: nn.Module, tokenizer: Any, rows: Sequence[list[int]], length: int) -> list[str]:
    from transformers import GenerationConfig

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    device = next(model.parameters()).device
    inputs, mask, _ = (tensor.to(device) for tensor in pad_left(rows, pad))
    greedy = GenerationConfig(
        max_new_tokens=length, do_sample=False, pad_token_id=pad, eos_token_id=tokenizer.eos_token_id
    )
    output = model.generate(input_ids=inputs, attention_mask=mask, generation_config=greedy)  # type: ignore[operator]
    return tokenizer.batch_decode(output[:, inputs.shape[1] :], skip_special_tokens=True)


def _by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length: little padding, hence little waste."""
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; expected at least 1")
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    for first in range(0, len(order), batch_size):
        yield order[first : first + batch_size]
