"""Text from the model itself: what it would write is what it knows, so calibrating on it needs no data."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from tqdm import tqdm


@torch.no_grad()
def sample_rows(model: nn.Module, rows: range, length: int, seed: int = 0) -> Int[Tensor, "rows length"]:
    """Sample rows of token ids from a causal language model, at temperature 1, each begun by a random token.

    A row depends on the model, the seed and its own number only, not on which rows are sampled with it or on
    which device: its random numbers are its own (Gumbel-max sampling). Tokens that end a text are not drawn, so
    every row has `length` tokens.
    """
    config: Any = model.config
    text_config = config.get_text_config()
    vocabulary = text_config.vocab_size
    begin, banned = text_config.bos_token_id, special_tokens(model)
    allowed = torch.ones(vocabulary, dtype=torch.bool)
    allowed[[token for token in banned if token < vocabulary]] = False
    # torch's generator takes 32 bits of a seed; the multiplier is odd, so seeds share no run of rows.
    generators = [torch.Generator().manual_seed((seed * 0x9E3779B1 + row) % 2**32) for row in rows]
    choices = allowed.nonzero().flatten()
    first = torch.stack([choices[torch.randint(len(choices), (1,), generator=g)] for g in generators])
    ids = first if begin is None else torch.cat([torch.full_like(first, begin), first], dim=1)
    device = next(model.parameters()).device
    step, cache = ids, None
    bar = tqdm(
        total=length,
        initial=ids.shape[1],
        desc="sampling",
        unit=" tokens",
        delay=2,
        leave=False,
        disable=None,
    )
    with bar:
        while ids.shape[1] < length:
            output = model(input_ids=step.to(device), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits = output.logits[:, -1, :vocabulary].float().cpu()
            noise = torch.stack([torch.empty(vocabulary).exponential_(generator=g) for g in generators])
            step = (logits - noise.log()).masked_fill(~allowed, -torch.inf).argmax(-1, keepdim=True)
            ids = torch.cat([ids, step], dim=1)
            bar.update()
    return ids[:, :length]


def special_tokens(model: Any) -> list[int]:
    """Return the ids of the tokens that begin, end or pad a text, as the model's configurations name them."""
    found: set[int] = set()
    for config in (model.config.get_text_config(), getattr(model, "generation_config", None)):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(config, name, None)
            found.update(value if isinstance(value, (list, tuple)) else [value] if value is not None else [])
    return sorted(found)
