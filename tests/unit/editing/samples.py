"""Edits and questions for tiny byte-level models."""

import torch

from hiplora.editing import CATEGORIES, Edit, Question
from tests.tiny import tiny_llama

EDITS = tuple(
    Edit(
        f"Thing {i} is",
        "cyan",
        new,
        f"thing {i}",
        CATEGORIES[i % 3],
        f"It, thing {i}, is",
        (Question(f"Box {i} is", "cyan"),) if i % 2 else (),
    )
    for i, new in enumerate(("blue", "pink", "grey", "lime", "gold", "teal"))
)
QUESTIONS = tuple(Question(f"Place {i} has a", word, f"place {i}") for i, word in enumerate(("roof", "door", "wall")))


def writer():
    """A tiny model that never ends its text early."""
    model = tiny_llama()
    model.generation_config.eos_token_id = None
    return model


@torch.no_grad()
def lively():
    """A tiny model whose tokens pay attention to each other, unlike those of one just initialised."""
    model = writer()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter *= 8
    return model
