"""How many tokens a model can read, in which order, and where they enter."""

import contextlib
from typing import Any


def context_length(model: Any) -> int | None:
    """Return how many tokens a model was made for; None if its configuration does not say."""
    config = getattr(model, "config", None)
    length = getattr(config.get_text_config(), "max_position_embeddings", None) if config is not None else None
    return length if isinstance(length, int) and length > 0 else None


def input_embeddings(model: Any) -> Any:
    """Return the layer that embeds a model's tokens; None if transformers does not find it (CANINE, MobileViT)."""
    with contextlib.suppress(NotImplementedError):
        return model.get_input_embeddings()


def position_limit(model: Any) -> int | None:
    """Return how many tokens a model can read if it has a table of positions; None if a rule gives any position."""
    from torch import nn

    context, vocabulary = context_length(model), input_embeddings(model)
    if model.config.model_type == "mpt":  # its biases for distances are made anew in every pass
        return context
    embeddings = (
        module for module in model.modules() if isinstance(module, nn.Embedding) and module is not vocabulary
    )
    sizes = [embedding.num_embeddings for embedding in embeddings]
    sizes += [len(sines) for sines in model.buffers() if sines.dim() == 2]
    return context if context and any(context <= size <= context + 2 for size in sizes) else None


def looks_ahead(model: Any) -> bool | None:
    """Whether later tokens change a model's logits at earlier ones, as for masked words; None without logits."""
    import torch

    ids = torch.zeros(2, 4, dtype=torch.long, device=next(model.parameters()).device)
    ids[1, 3] = 1
    with torch.no_grad():
        logits = getattr(model(input_ids=ids), "logits", None)
    if logits is None or logits.dim() != 3:
        return None
    first, *_, last = (logits[0] - logits[1]).abs().amax(-1).tolist()
    return first > 1e-3 * last


def within_context(length: int, model: Any) -> int:
    """Return a length in tokens, or how many the model can read where these are fewer."""
    return min(length, position_limit(model) or length)
