"""The contract runs over tiny Llamas (untied, tied, with every kind of activation basis) and the real SmolLM2-135M."""

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from hiplora import HipLoraConfig
from tests.tiny import tiny_llama

ACTIVATION = {
    "activation": {"basis": "activation"},
    "one-sided": {"basis": "activation", "basis_sides": "input"},
    "soft": {"basis": "activation", "projection": "soft"},
}
BASES = ["untied", "tied", *ACTIVATION, pytest.param("smollm2", marks=[pytest.mark.real_model, pytest.mark.slow])]


class Base:
    """A base model that can be made afresh, and what an adapter on it looks like."""

    def __init__(self, kind, folder=None):
        self.kind, self.folder = kind, folder

    def make(self, dtype=torch.float32):
        if self.folder is None:
            return tiny_llama(tie=self.kind == "tied", dtype=dtype)
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype).eval()

    def config(self, **changes):
        if self.folder is not None:  # two of the thirty layers are enough, and quick to factor
            changes.setdefault("layers_to_transform", [0, 29])
        kind = ACTIVATION.get(self.kind, {})
        return HipLoraConfig(
            **{"preset": "paper", "r": 4, "principal_rank": 8, "lora_dropout": 0.0, **kind, **changes}
        )

    def adapted(self, **changes):
        return peft.get_peft_model(self.make(), self.config(**changes))

    def trained(self, ids, **changes):
        model = self.adapted(**changes)
        train(model, ids)
        return model


@pytest.fixture(params=BASES)
def base(request):
    folder = request.getfixturevalue("smollm2") if request.param == "smollm2" else None
    return Base(request.param, folder)


@pytest.fixture
def tiny():
    return Base("untied")


@pytest.fixture
def ids():
    return torch.randint(0, 256, (2, 10), generator=torch.Generator().manual_seed(3))


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def train(model, ids, steps=3, lr=1e-2, optimizer=torch.optim.AdamW):
    """Train the trainable parameters on one batch in a bare loop; returns the losses."""
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses
