"""What a model writes itself, greedily: answers before and after an adapter."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hiplora.evaluation.likelihood import by_length, encode, pad_left


@torch.no_grad()
def continuations(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], length: int, batch_size: int = 64
) -> list[str]:
    """Return what the model writes greedily after each prompt, up to `length` tokens, without special tokens.

    A prompt is tokenized as before a response in `encode`. The model is in eval mode meanwhile.
    """
    from transformers import GenerationConfig

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    greedy = GenerationConfig(
        max_new_tokens=length, do_sample=False, pad_token_id=pad, eos_token_id=tokenizer.eos_token_id
    )
    rows = [_prompt_ids(tokenizer, prompt) for prompt in prompts]
    written = [""] * len(rows)
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        for batch in by_length(range(len(rows)), [len(row) for row in rows], batch_size):
            ids, mask, _ = (tensor.to(device) for tensor in pad_left([rows[index] for index in batch], pad))
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy)  # type: ignore[operator]
            texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
            for index, text in zip(batch, texts, strict=True):
                written[index] = text
    finally:
        model.train(training)
    return written


def _prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Return the tokens before an answer: the same that its likelihood is conditioned on."""
    encoded = encode(tokenizer, prompt, " x")
    return list(encoded.ids[: encoded.scored[0]])
