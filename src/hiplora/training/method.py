"""The base classes of a recipe's methods: their settings, how an adapter is made, and what a method does in training.

A method is a subclass of `Method` with a `name`, in a file of `baselines/`. Recipes are checked before torch is
loaded, so these files import torch and PEFT only inside functions.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

from pydantic import Field

from hiplora.data.examples import Block
from hiplora.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor
    from torch.utils.data import BatchSampler, Sampler

    from hiplora.training.recipe import TrainSettings
    from hiplora.tuner import CalibrationText

ADAPTER = "default"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BASIS_FILE = "basis.safetensors"  # the directions that a widened training protected, more than the adapter's factors
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")

Begin = Callable[["PeftModel"], None]  # brings a new adapter to the point where training begins


class Penalty(NamedTuple):
    """A term of the loss, added once a step: `weight` times `value(model, step)`; `name` is its column in the metrics.

    The value is a scalar with gradients to the adapter.
    """

    name: str
    weight: float
    value: "Callable[[Any, int], Tensor]"


class Session:
    """What a method does while its adapter trains; by default, nothing special."""

    penalties: Sequence[Penalty] = ()
    clients = 1  # micro-batches of a step that share a penalty

    def __init__(self, model: "PeftModel"):
        self.model = model

    def batches(self, sampler: "Sampler[int]", batch_size: int) -> "BatchSampler | None":
        """Return the batches of an epoch; None for consecutive ones."""

    def micro_batch(self, number: int) -> contextlib.AbstractContextManager[None]:
        """Wrap forward and backward of the micro-batch `number` of a step."""
        return contextlib.nullcontext()

    def measuring(self) -> contextlib.AbstractContextManager[None]:
        """Wrap measuring and saving the result: inside, the model is what the training would return now."""
        return contextlib.nullcontext()

    def after_step(self, step: int, last: bool) -> None:
        """Act between the optimizer's step and the clearing of its gradients; `step` counts from 1."""

    def save(self, folder: Path) -> None:
        """Write the adapter, and everything else that a resumed training needs, into a checkpoint."""
        save_adapter(self.model, folder)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        self.model.load_adapter(str(folder), ADAPTER, is_trainable=True)


class Method(Block):
    """Base of all methods: the modules they adapt, under PEFT's name.

    A method that `moves_base` subtracts the product of its first factors from the base weights; it is saved as the
    difference from the untouched base. Fields in `steering` may differ between an adapter and a training that carries
    it on. `kind` says what stock PEFT loads the adapter as; None means that PEFT needs hiplora to load it.
    """

    title: ClassVar[str]
    summary: ClassVar[str]
    kind: ClassVar[str | None] = "a plain LoRA adapter"
    moves_base: ClassVar[bool] = False
    steering: ClassVar[tuple[str, ...]] = ()
    not_of_peft: ClassVar[tuple[str, ...]] = ("name",)

    target_modules: list[str] | str = Field(default=list(ATTENTION_PROJECTIONS), min_length=1)
    """Modules to adapt: a list of names, one regular expression, or `all-linear`."""

    def settings(self) -> dict[str, Any]:
        """Return the fields that PEFT's configuration has too."""
        return self.model_dump(exclude={*self.not_of_peft})

    def peft_config(self, steps: int | None = None) -> "PeftConfig":
        """Return the PEFT configuration for a training of so many steps; ConfigError if it must know them."""
        raise NotImplementedError

    def continued_config(self, stored: Mapping[str, Any]) -> "PeftConfig":
        """Return the configuration of a training that carries on an adapter, whose own configuration is `stored`."""
        return self.peft_config()

    def check_layer(self, config: Any, layer: Any) -> None:
        """Check that a layer, a `Target`, has enough directions for `config`; ConfigError names both."""

    def prepare(self, config: Any, model: Any, tokenizer: Any) -> Begin | None:
        """Measure on the bare model what the adapter needs; may change `config`. Return how the adapter begins.

        Raises ConfigError if the settings do not fit the model, DataError if the calibration text cannot be used, and
        FactorError if a layer saw none of it, or a weight cannot be decomposed.
        """
        return None

    def session(self, model: "PeftModel", sequences: int) -> Session:
        """Return what the method does while it trains on so many sequences."""
        return Session(model)

    def batches(self, sequences: int, batch_size: int) -> int:
        """Return the number of batches in an epoch."""
        return math.ceil(sequences / batch_size)

    def check_training(self, train: "TrainSettings") -> None:
        """Check that the training settings fit the method; raises ValueError."""


class LowRank(Method):
    """Base of the methods with low-rank factors, under PEFT's names; LoRA, initialised by `peft_start`."""

    steering: ClassVar[tuple[str, ...]] = ("lora_dropout",)
    peft_start: ClassVar[dict[str, Any]] = {}

    r: int = Field(default=16, ge=1)
    """Rank of the low-rank factors (of the residual channel, for HiP-LoRA)."""
    lora_alpha: int | float = Field(default=32, gt=0)
    """The low-rank update is scaled by lora_alpha / r."""
    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    """Dropout on the input of the low-rank update."""
    exclude_modules: list[str] | str | None = None
    """Modules to leave alone, although target_modules names them."""
    layers_to_transform: list[int] | int | None = None
    """Indices of the layers to adapt; all if empty."""
    layers_pattern: list[str] | str | None = None
    """Name of the model's list of layers, where layers_to_transform needs it."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(default={})
    """Module name or pattern → its own r."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(default={})
    """Module name or pattern → its own lora_alpha."""
    modules_to_save: list[str] | None = None
    """Modules to train in full and save with the adapter."""

    def peft_config(self, steps: int | None = None) -> "PeftConfig":
        """Return a LoRA configuration."""
        from peft import LoraConfig

        return LoraConfig(task_type="CAUSAL_LM", **self.peft_start, **self.settings())

    def check_layer(self, config: Any, layer: Any) -> None:
        """Check that no factor is larger than the weight that it changes, which PEFT would make."""
        r, least = self.rank_of(config, layer), min(layer.shape)
        if r > least:
            raise ConfigError(f"layer {layer.name}: r {r} exceeds min(out, in) = {least}; lower r or set rank_pattern")

    @staticmethod
    def rank_of(config: Any, layer: Any) -> int:
        """Return the rank of a layer's factors when the training begins."""
        from hiplora.tuner import for_module

        return for_module(config.rank_pattern or {}, layer.name, getattr(config, "init_r", None) or config.r)


class FromInputs(Block):
    """The calibration text of methods that measure a layer's inputs."""

    calibration_text: str | None = Field(default=None, min_length=1)
    """Text file, training data or hub data set to measure the layers' inputs on, instead of text sampled from the
    model. In a recipe, relative to the recipe's folder; with --set, to the current folder."""
    calibration_tokens: int = Field(default=10_000, ge=2)
    """Tokens to sample, or to read of `calibration_text`."""

    def calibration_rows(self, model: Any, tokenizer: Any) -> "list[Tensor] | None":
        """Return the rows of the calibration text, as `hiplora.data.texts` reads it; None for sampled text."""
        from hiplora.data.texts import calibration_rows

        text = self.calibration_text
        return None if text is None else calibration_rows(tokenizer, text, self.calibration_tokens, model)

    def text(self, model: Any, tokenizer: Any, **options: Any) -> "CalibrationText":
        """Return the text that a bare model is measured on."""
        from hiplora.tuner import CalibrationText

        return CalibrationText(model, self.calibration_rows(model, tokenizer), self.calibration_tokens, **options)


def save_adapter(model: "PeftModel", folder: Path) -> None:
    """Save an adapter's own tensors and its configuration, never the base model's embeddings."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Adapter .* have invalid shape")  # AdaLoRA's modules of rank 0
        model.save_pretrained(str(folder), save_embedding_layers=False)
