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
from jaxtyping import Float
from peft import PeftConfig, PeftModel, get_peft_model
from pydantic import ConfigDict, Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from hiplora.adapters import AdapterUpdate, compare_modules, read_update, refuse_over, write_lora
from hiplora.adapters.update import Pair
from hiplora.editing.edits import Edit
from hiplora.errors import AdapterError, ConfigError
from hiplora.evaluation.likelihood import encode, response_log_probs
from hiplora.tuner import HipLoraConfig, model_fingerprint
from hiplora.tuner.targets import find_targets, frozen_weight, quantization

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


def as_stored(layer: nn.Module, weight: Tensor) -> Tensor:
    """Turn an (m, n) weight into the layout in which a layer stores it, or back."""
    return weight.T if isinstance(layer, Conv1D) else weight


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
    """Settings of all methods that edit weights: the blocks whose `mlp_outputs` are edited (None: `default_layers`).

    The directions to preserve are measured on `calibration_tokens` of text that the model samples itself, by `seed`.
    """

    title: ClassVar[str]
    kind: ClassVar[str] = "a plain LoRA"  # what is saved

    layers: tuple[int, ...] | None = None
    calibration_tokens: Annotated[int, Field(ge=2)] = 10_000
    seed: int = 0

    def modules(self, model: nn.Module) -> list[str]:
        """Return the edited modules' names, in order; ConfigError if the model lacks them."""
        projections = mlp_outputs(model)
        depth = len(projections)
        if depth < 2:
            raise ConfigError(
                f"{self.title} edits the dense MLPs of unquantised decoders, and {type(model).__name__} has {depth} of "
                "the two it takes at least; train an adapter instead"
            )
        layers = default_layers(depth) if self.layers is None else self.layers
        if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] > depth - 2:
            raise ConfigError(
                f"layers is {list(layers)}; expected rising indices from 0 to {depth - 2}: the model has "
                f"{depth} blocks with an MLP, and something must come after the last that is edited"
            )
        return [projections[index] for index in layers]


def default_layers(depth: int) -> tuple[int, ...]:
    """Return up to five blocks that end at a quarter of the depth: 4 to 8 of 32, as AlphaEdit's authors chose."""
    last = min(round(depth / 4), depth - 2)
    return tuple(range(max(0, last - 4), last + 1))


def block_of(name: str) -> str:
    """Return the numbered block of a module; empty if it is in none."""
    match = re.match(r".*?\.\d+(?=\.)", name)
    return match[0] if match else ""


def mlp_outputs(model: Any) -> list[str]:
    """Return of each block of a decoder the layer that its MLP ends with, unless it is quantised or of experts."""
    outputs: dict[str, str] = {}
    if model.config.is_encoder_decoder:
        return []
    with contextlib.suppress(ConfigError):  # no MLP was recognised
        width, modules = getattr(model.config.get_text_config(), "hidden_size", None), dict(model.named_modules())
        for target in find_targets(model, HipLoraConfig()):
            layer, block = modules.get(target.name), block_of(target.name)
            editable = isinstance(layer, (nn.Linear, Conv1D)) and quantization(layer) is None
            if block and editable and "expert" not in target.name and target.shape[0] == width:
                outputs[block] = target.name
    return list(outputs.values())


class WeightEditor(Editor):
    """Edits in the weights of a few layers, `modules`; ConfigError if the model lacks them.

    `_state` has each edited `NAME.weight` (m, n), a separate tensor, and what else a method needs to go on from it.
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
            self.write(name, self._state.get(f"{name}.weight", self.of_base(name)))

    @abstractmethod
    def factors(self) -> dict[str, Pair]:
        """Return each module's update as (A, B) of `ΔW = BA`, in fp32."""

    def weight(self, name: str) -> Float[Tensor, "m n"]:
        """Return a module's weight as it is now."""
        return frozen_weight(self.model.get_submodule(name))

    def of_base(self, name: str) -> Float[Tensor, "m n"]:
        """Return a module's weight as it was."""
        return as_stored(self.model.get_submodule(name), self._originals[f"{name}.weight"][1])

    def write(self, name: str, weight: Float[Tensor, "m n"]) -> None:
        """Set a module's weight."""
        layer = self.model.get_submodule(name)
        layer.get_parameter("weight").data = as_stored(layer, weight)

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
