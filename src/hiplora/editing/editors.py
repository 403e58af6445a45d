"""Ways to put edits into a model and to take them out again."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from hiplora.editing.edits import Edit
from hiplora.editing.train import EditTraining, train_edits
from hiplora.errors import AdapterError
from hiplora.tuner import model_fingerprint

Adapt = Callable[[Any], PeftModel]
OnStep = Callable[[dict[str, float]], None]


class Editor(Protocol):
    """A way to edit one model. `teach` adds to what was taught before, `reset` takes all of it back."""

    @property
    def model(self) -> nn.Module:
        """The model as it is edited now."""
        ...

    def teach(self, edits: Sequence[Edit]) -> dict[str, Any]:
        """Put edits in, and return what that took, for JSON."""
        ...

    def reset(self) -> None:
        """Make the model answer as the base again."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return copies of all that was taught so far, which `restore` takes."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from where another editor, made in the same way, was when it gave this state."""
        ...

    def off(self) -> contextlib.AbstractContextManager[None]:
        """Have the model answer as the base, bit for bit, inside the block."""
        ...

    def close(self) -> None:
        """Leave the base behind as it was found."""
        ...


class Untouched:
    """The weights, gradient flags and modes of a base model, kept by reference, to be put back and compared.

    A method that gives a layer other weights (PiSSA) is undone; one that writes into them is found out.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._modes = {module: module.training for module in model.modules()}
        self._kept = {name: (p, p.data, p.requires_grad) for name, p in model.named_parameters()}
        self.fingerprint = model_fingerprint(model)

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Have the base's own values in its parameters for a while; then those that they had."""
        edited = [(parameter, parameter.data) for parameter, _, _ in self._kept.values()]
        try:
            for parameter, values, _ in self._kept.values():
                parameter.data = values
            yield
        finally:
            for parameter, values in edited:
                parameter.data = values

    def restore(self) -> None:
        """Put everything back.

        Raises:
            AdapterError: the model has other parameters than before, or their values changed in place.
        """
        if {name: id(p) for name, p in self._model.named_parameters()} != {
            name: id(kept[0]) for name, kept in self._kept.items()
        }:
            raise AdapterError(
                "editing left other parameters on the base model than it had; load the model again"
            )
        for parameter, values, gradient in self._kept.values():
            parameter.data = values
            parameter.requires_grad_(gradient)
            parameter.grad = None
        for module, mode in self._modes.items():
            module.training = mode
        if model_fingerprint(self._model) != self.fingerprint:
            raise AdapterError("editing changed weights of the base model in place; load the model again")


class AdapterEditor:
    """Edits trained into an adapter of PEFT.

    `adapt` is a configuration, or a function that puts an adapter on the bare model. The adapter's start is drawn with
    the training's seed, and `reset` brings back that start.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        adapt: PeftConfig | Adapt,
        training: EditTraining,
        on_step: OnStep | None = None,
    ):
        self._base, self._tokenizer = Untouched(model), tokenizer
        self._training, self._on_step = training, on_step
        torch.manual_seed(training.seed)
        self.model: PeftModel = (
            get_peft_model(model, adapt) if isinstance(adapt, PeftConfig) else adapt(model)
        )
        self._start = self.state()

    def teach(self, edits: Sequence[Edit]) -> dict[str, Any]:
        """Train the adapter on some edits; the record has each step's loss, seconds and tokens."""
        result = train_edits(self.model, self._tokenizer, edits, self._training, self._on_step)
        return {"loss": list(result.curve), "seconds": result.seconds, "tokens": result.tokens}

    def reset(self) -> None:
        """Put the adapter's start back."""
        self.restore(self._start)

    def state(self) -> dict[str, Tensor]:
        """Return copies of the adapter's parameters."""
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Give the adapter these parameters."""
        for name, values in state.items():
            self.model.get_parameter(name).copy_(values)

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Have the base answer: without the adapter, and with its own weights where the method changed them."""
        with self.model.disable_adapter(), self._base.shown():
            yield

    def close(self) -> None:
        """Take the adapter off."""
        self.model.unload()  # type: ignore[operator]
        self._base.restore()
