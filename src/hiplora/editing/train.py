"""Training on edits: a bare loop, since an edit set is a few dozen lines of a dozen tokens."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hiplora.editing.edits import Edit
from hiplora.errors import AdapterError, ConfigError
from hiplora.evaluation.likelihood import Encoded, encode, response_log_probs


@dataclass(frozen=True)
class EditTraining:
    """How edits are trained: AdamW at a constant rate on the new answers' mean NLL per token, in nats."""

    steps: int = 20
    lr: float = 2e-3
    batch_size: int = 16
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    seed: int = 42

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"lr is {self.lr}; expected a number above 0")


@dataclass(frozen=True)
class EditTrainingResult:
    """What a training run did: loss of each step before its update, seconds, and tokens that the model read."""

    curve: tuple[float, ...]
    seconds: float
    tokens: int


def train_edits(
    model: nn.Module,
    tokenizer: Any,
    edits: Sequence[Edit],
    training: EditTraining,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> EditTrainingResult:
    """Train the parameters of `model` that require gradients on `prompt → new` of each edit.

    The order of the edits depends on `training.seed` alone, so that methods see the same batches. `on_step` gets
    a row per step: step, steps, loss, tokens_per_second.

    Raises:
        AdapterError: nothing is trainable, or the loss is not finite.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise AdapterError("the model has no trainable parameter; wrap it with peft.get_peft_model first")
    optimizer = torch.optim.AdamW(parameters, lr=training.lr, weight_decay=training.weight_decay)
    examples = [encode(tokenizer, edit.prompt, f" {edit.new}") for edit in edits]
    order = _Order(len(examples), training.batch_size, training.seed)
    torch.manual_seed(training.seed)
    curve, tokens, began = [], 0, time.perf_counter()
    model.train()
    for step in range(1, training.steps + 1):
        batch = [examples[index] for index in order.next()]
        curve.append(_step(model, optimizer, parameters, batch, training.max_grad_norm))
        tokens += sum(len(example.ids) for example in batch)
        if not math.isfinite(curve[-1]):
            raise AdapterError(f"the loss became {curve[-1]} at step {step}; lower the learning rate")
        if on_step:
            speed = tokens / (time.perf_counter() - began)
            on_step({"step": step, "steps": training.steps, "loss": curve[-1], "tokens_per_second": speed})
    model.eval()
    return EditTrainingResult(tuple(curve), time.perf_counter() - began, tokens)


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    batch: Sequence[Encoded],
    max_grad_norm: float,
) -> float:
    loss = -torch.cat(response_log_probs(model, batch)).mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    optimizer.step()
    return loss.item()


class _Order:
    """Batches of indices: each epoch a fresh permutation, batches across the seam of two epochs."""

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self._count, self._size = count, min(batch_size, count)
        self._generator = torch.Generator().manual_seed(seed)
        self._waiting: list[int] = []

    def next(self) -> list[int]:
        while len(self._waiting) < self._size:
            self._waiting += torch.randperm(self._count, generator=self._generator).tolist()
        batch, self._waiting = self._waiting[: self._size], self._waiting[self._size :]
        return batch
