"""Edits and questions for tiny byte-level models."""

import torch

from hiplora.editing import CATEGORIES, Edit, Question
from tests.tiny import tiny_llama


def _edit(i, new):
    neighbours = (Question(f"Box {i} is", "cyan"),) if i % 2 else ()
    return Edit(f"Thing {i} is", "cyan", new, f"thing {i}", CATEGORIES[i % 3], f"It, thing {i}, is", neighbours)


EDITS = tuple(_edit(i, new) for i, new in enumerate(("blue", "pink", "grey", "lime", "gold", "teal")))
COUNTERFACT = {
    "prompt": "The sea around Skye is the",
    "subject": "Skye",
    "target_true": "Minch",
    "target_new": "Baltic",
    "relation": "P276",
    "paraphrase_prompts": ["Boats to Skye cross the", "From Skye one sees the"],
    "neighborhood_prompts": ["The sea around Lewis is the", "The sea around Rona is the"],
    "neighborhood_answers": ["Minch", "Minch"],
}
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
