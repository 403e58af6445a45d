"""A model's own answers to prompts, before and after an adapter."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hiplora.evaluation.likelihood import pad_left
from hiplora.evaluation.mounting import BASE, mounted, name_adapters

if TYPE_CHECKING:
    import pandas as pd


@torch.no_grad()
def generate(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int = 64, batch_size: int = 8
) -> list[str]:
    """Return the model's greedy completions of `prompts`, without the prompts and special tokens."""
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    found: list[str] = []
    for first in range(0, len(prompts), batch_size):
        rows = [tokenizer(prompt)["input_ids"] for prompt in prompts[first : first + batch_size]]
        ids, mask, _ = (tensor.to(device) for tensor in pad_left(rows, pad))
        written = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad,
        )
        found += tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
    return found


def answers(
    model: nn.Module,
    tokenizer: Any,
    adapters: Sequence[str | os.PathLike],
    prompts: Sequence[str],
    max_new_tokens: int = 64,
) -> "pd.DataFrame":
    """Return the answers of a bare model and of adapters mounted on it: columns prompt, base, and one per adapter.

    Raises:
        AdapterError, ConfigError: as `mounted` and `name_adapters`.
    """
    import pandas as pd

    columns = {"prompt": list(prompts), BASE: generate(model, tokenizer, prompts, max_new_tokens)}
    for name, folder in name_adapters(adapters).items():
        with mounted(model, folder) as adapted:
            columns[name] = generate(adapted, tokenizer, prompts, max_new_tokens)
    return pd.DataFrame(columns)
