"""Put edits into a model and take them out again: the interfaces, and training them into an adapter of PEFT."""

import contextlib
import functools
import itertools
import math
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from pydantic import ConfigDict, Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from tqdm import tqdm

from hiplora.adapters import AdapterUpdate, compare_modules, read_update, refuse_over, write_lora
from hiplora.adapters.update import Pair
from hiplora.editing.edits import Edit
from hiplora.errors import AdapterError, ConfigError
from hiplora.evaluation.likelihood import encode, response_log_probs
from hiplora.tuner import model_fingerprint

Adapt = Callable[[Any], PeftModel]
_WRITE_TOLERANCE = 1e-5  # share of an update's norm that may be lost in writing
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class EditTraining:
    """How edits are trained: AdamW at a constant rate on the new answers' mean NLL per token, in nats."""

    steps: PositiveInt = 20
    lr: PositiveFloat = 2e-3
    batch_size: PositiveInt = 16
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    seed: int = 42


def train_edits(
    model: nn.Module,
    tokenizer: Any,
    edits: Sequence[Edit],
    training: EditTraining,
    on_step: Callable[[int], None] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Train the parameters of `model` that require gradients on `prompt → new` of each edit.

    Returns the `loss` of each step before its update, `seconds`, and the `tokens` read. The order of the edits depends
    on `training.seed` alone. `on_step` gets the number of each finished step. AdapterError if nothing is trainable, or
    the loss is not finite.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise AdapterError("the model has no trainable parameter; wrap it with peft.get_peft_model first")
    optimizer = torch.optim.AdamW(parameters, lr=training.lr, weight_decay=training.weight_decay)
    examples = [encode(tokenizer, edit.prompt, f" {edit.new}") for edit in edits]
    generator, size = torch.Generator().manual_seed(training.seed), min(training.batch_size, len(edits))
    # A new permutation each epoch; a batch may have edits of two epochs.
    order = (index for _ in itertools.count() for index in torch.randperm(len(edits), generator=generator).tolist())
    torch.manual_seed(training.seed)
    losses: list[float] = []
    tokens, began = 0, time.perf_counter()
    model.train()
    for step in tqdm(range(1, training.steps + 1), "editing", leave=False, disable=None if progress else True):
        batch = [examples[index] for index in itertools.islice(order, size)]
        loss = -torch.cat(response_log_probs(model, batch)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
        tokens += sum(len(example.ids) for example in batch)
        if not math.isfinite(losses[-1]):
            raise AdapterError(f"the loss became {losses[-1]} at step {step}; lower the learning rate")
        if on_step:
            on_step(step)
    model.eval()
    return {"loss": losses, "seconds": time.perf_counter() - began, "tokens": tokens}


class Editor(ABC):
    """A way to edit one model: `model` has the edits so far, and `teach` adds to them.

    The base's weights, gradient flags and modes are kept by reference: `close` puts them back and checks them.
    """

    model: nn.Module

    def __init__(self, base: nn.Module):
        self._base = base
        self._modes = {module: module.training for module in base.modules()}
        self._originals = {name: (p, p.data, p.requires_grad) for name, p in base.named_parameters()}
        self._fingerprint = model_fingerprint(base)

    @abstractmethod
    def teach(self, edits: Sequence[Edit]) -> dict[str, Any]:
        """Put edits in; return `seconds` and the method's own numbers, for JSON."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return the edits so far, for `restore`."""

    @abstractmethod
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Return to the `state` of an editor with the same settings; an empty one takes back all edits."""

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Make the model answer as the base, bit for bit, inside the block."""
        edited = [parameter.data for parameter, _, _ in self._originals.values()]
        try:
            for parameter, values, _ in self._originals.values():
                parameter.data = values
            yield
        finally:
            for (parameter, _, _), values in zip(self._originals.values(), edited, strict=True):
                parameter.data = values

    def close(self) -> None:
        """Leave the base as it was found; AdapterError if values of its weights changed in place."""
        for parameter, values, gradient in self._originals.values():
            parameter.data = values
            parameter.requires_grad_(gradient)
            parameter.grad = None
        for module, mode in self._modes.items():
            module.training = mode
        if model_fingerprint(self._base) != self._fingerprint:
            raise AdapterError("editing changed weights of the base model in place; load the model again")


class AdapterEditor(Editor):
    """Edits trained into an adapter of PEFT: `adapt` is a configuration, or puts an adapter on the bare model."""

    model: PeftModel

    def __init__(
        self, model: Any, tokenizer: Any, adapt: PeftConfig | Adapt, training: EditTraining, progress: bool = False
    ):
        super().__init__(model)
        torch.manual_seed(training.seed)
        self.model = get_peft_model(model, adapt) if isinstance(adapt, PeftConfig) else adapt(model)
        self._train = functools.partial(train_edits, self.model, tokenizer, training=training, progress=progress)
        self._initial = {name: values.clone() for name, values in self.state().items()}

    def teach(self, edits: Sequence[Edit]) -> dict[str, Any]:
        """Train the adapter on some edits; returns what `train_edits` does."""
        return self._train(edits)

    def state(self) -> dict[str, Tensor]:
        """Return the parameters that are trained."""
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Give the adapter these parameters, or those that it began with."""
        for name, values in (state or self._initial).items():
            self.model.get_parameter(name).copy_(values)

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Disable the adapter, and put the base's own weights back where the method changed them."""
        with self.model.disable_adapter(), super().off():
            yield

    def close(self) -> None:
        """Unload the adapter."""
        self.model.unload()  # type: ignore[operator]
        super().close()


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class WeightEdits:
    """Settings of all methods that edit weights: the blocks whose `mlp.down_proj` is edited (None: `default_layers`).

    The directions to preserve are measured on `calibration_tokens` of text that the model samples itself, by `seed`.
    """

    title: ClassVar[str]
    kind: ClassVar[str] = "a plain LoRA"  # what is saved

    layers: tuple[int, ...] | None = None
    calibration_tokens: Annotated[int, Field(ge=2)] = 10_000
    seed: int = 0

    def modules(self, model: nn.Module) -> list[str]:
        """Return the edited modules' names, in order; ConfigError if it is no Llama, or has no block of an index."""
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        projections = [name for name in linear if re.search(r"\.\d+\.mlp\.down_proj$", name)]
        depth = len(projections)
        if depth < 2:
            raise ConfigError(
                "the model has no blocks with a linear layer mlp.down_proj to edit; train an adapter instead"
            )
        layers = default_layers(depth) if self.layers is None else self.layers
        if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] > depth - 2:
            raise ConfigError(
                f"layers is {list(layers)}; expected rising indices from 0 to {depth - 2}: the model has "
                f"{depth} blocks, and something must come after the last that is edited"
            )
        return [projections[index] for index in layers]


def default_layers(depth: int) -> tuple[int, ...]:
    """Return up to five blocks that end at a quarter of the depth: 4 to 8 of 32, as AlphaEdit's authors chose."""
    last = min(round(depth / 4), depth - 2)
    return tuple(range(max(0, last - 4), last + 1))


class WeightEditor(Editor):
    """Edits in the weights of a few layers, `modules`; ConfigError if the model lacks them.

    `_state` has each edited `NAME.weight`, a separate tensor, and what else a method needs to go on from it.
    """

    def __init__(self, model: Any, settings: WeightEdits):
        self.model: nn.Module = model
        self.modules = settings.modules(model)
        self._state: dict[str, Tensor] = {}
        super().__init__(model)
        model.eval().requires_grad_(False)

    def state(self) -> dict[str, Tensor]:
        """Return the edited weights, and what they were made from."""
        return dict(self._state)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Write the edits of a `state` in; an empty one puts the base's weights back."""
        self._state = {key: tensor.to(self.weight(key.rpartition(".")[0]).device) for key, tensor in state.items()}
        for name in self.modules:
            self.weight(name).data = self._state.get(f"{name}.weight", self.of_base(name))

    @abstractmethod
    def factors(self) -> dict[str, Pair]:
        """Return each module's update as (A, B) of `ΔW = BA`, in fp32."""

    def weight(self, name: str) -> nn.Parameter:
        """Return a module's weight as it is now."""
        return self.model.get_submodule(name).get_parameter("weight")

    def of_base(self, name: str) -> Tensor:
        """Return a module's weight as it was."""
        return self._originals[f"{name}.weight"][1]

    def save(self, folder: Path, base: str) -> None:
        """Write the edits so far as a plain LoRA adapter; `base` names the model.

        AdapterError if what was written differs from the update.
        """
        factors = {name: (A.cpu(), B.cpu()) for name, (A, B) in self.factors().items()}
        config = {"target_modules": sorted(factors), "task_type": "CAUSAL_LM"}
        update = AdapterUpdate(base, "lora", config, factors, source="the edits")
        folder.mkdir(parents=True, exist_ok=True)
        write_lora(update, folder)
        refuse_over(compare_modules(update, read_update(folder)), _WRITE_TOLERANCE)
