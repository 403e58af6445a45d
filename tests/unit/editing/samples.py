"""Edits and questions for tiny byte-level models, and their weights as bytes."""

import torch

from hiplora.editing import Edit, Question
from tests.tiny import tiny_llama

WORDS = ("blue", "pink", "grey", "lime", "gold", "teal")
EDITS = tuple(
    Edit(
        f"Thing {i} is",
        "cyan",
        new,
        f"thing {i}",
        ("Entity/Attribute", "Relation/Fact", "Temporal/Numeric")[i % 3],
        f"It, thing {i}, is",
        (Question(f"Box {i} is", "cyan"),) if i % 2 else (),
    )
    for i, new in enumerate(WORDS)
)
QUESTIONS = tuple(Question(f"Place {i} has a", word, f"place {i}") for i, word in enumerate(("roof", "door", "wall")))


def bits(model):
    """All of a model's own state, to be compared bit for bit."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def writer():
    """A tiny model that never ends its text early."""
    model = tiny_llama()
    model.generation_config.eos_token_id = None
    return model


def lively():
    """A tiny model whose tokens pay attention to each other, unlike those of one just initialised."""
    model = writer()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter *= 8
    return model
