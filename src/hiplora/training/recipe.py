"""The training recipe: a YAML file with model, data, method and training settings, checked before a model is loaded.

The defaults of the `train` fields are the paper's (Appendix B), for studies and `preset: paper`; `load_recipe` replaces
them by `DEFAULTS` for a user's own data. Nothing here imports torch.
"""

import math
import os
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from hiplora.data.examples import Block, DataSettings, PathText
from hiplora.data.rows import is_hub_name
from hiplora.training.baselines import METHODS, AnyMethod

DEFAULTS: dict[str, dict[str, Any]] = {
    "data": {"template": "auto"},
    "train": {
        "epochs": 3.0,
        "gradient_accumulation": 4,
        "max_length": 1024,
        "packing": False,
        "nonzero_warmup": True,
        "drift_tokens": 512,
    },
}


class TrainSettings(Block):
    """How to train: AdamW, a linear warm-up, then a learning rate that stays or falls."""

    lr: float = Field(default=2e-4, gt=0)
    """Peak learning rate. The paper's text lacks it; 2e-4 is usual for LoRA."""
    steps: int | None = Field(default=2000, ge=1, le=10**9)
    """Optimizer steps; 2000 unless `epochs` is given. Give one of the two."""
    epochs: float | None = Field(default=None, gt=0, le=10**6)
    """Passes over the data, instead of `steps`; `hiplora train` makes 3."""
    batch_size: int = Field(default=4, ge=1, le=10**6)
    """Sequences in one forward pass."""
    gradient_accumulation: int = Field(default=32, ge=1, le=10**6)
    """Forward passes per optimizer step, shared between the processes of a distributed run: batch_size ×
    gradient_accumulation is the global batch (128; 16 in `hiplora train`)."""
    max_length: int = Field(default=2048, ge=2)
    """Tokens in a sequence; 1024 in `hiplora train`. Longer responses are cut at the end, rows whose prompt alone
    fills it are left out, both are counted. Plain text is cut into pieces of this length."""
    packing: bool = True
    """Put several rows into one sequence of max_length; rows never attend to each other. False in `hiplora train`."""
    lr_scheduler: Literal["constant", "cosine"] = "constant"
    """What follows the warm-up: `constant` stays at the peak, `cosine` falls to 0 at the last step."""
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps over which the learning rate rises."""
    nonzero_warmup: bool = False
    """Begin the warm-up one step further, so that the first step is not spent at rate 0; true in `hiplora train`."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's weight decay; only the adapter is trained."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Clip the gradient to this norm; 0 switches clipping off."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the base model and of the computation; the adapter stays in fp32. `auto` is bf16, the paper's, on a
    GPU that has it, and fp32 elsewhere. fp16 needs a GPU."""
    load_in_4bit: bool = False
    """Hold the weights of the base model's linear layers in 4 bits (NF4 with double quantisation, as QLoRA), by
    bitsandbytes. Not for methods that move the base weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    log_every: int = Field(default=1, ge=1)
    """Steps between two rows of metrics.jsonl."""
    report_to: str | list[str] = "none"
    """Trackers of the Trainer: `tensorboard`, `wandb`, `mlflow`, …, or a list."""
    save_every: int = Field(default=100, ge=1)
    """Steps between two checkpoints; the last step always has one."""
    keep_checkpoints: int = Field(default=1, ge=1)
    """Number of checkpoints to keep, the newest."""
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between measurements of the held-out loss, besides before and after."""
    kl_weight: float = Field(default=0.0, ge=0)
    """Price of a nat of KL(base ‖ adapted) per token, measured once a step on other text and added to the loss; 0 adds
    nothing. Not for methods that move the base weights."""
    kl_text: PathText | None = Field(default=None, min_length=1)
    """Text file or training data to measure it on, instead of sampled text."""
    kl_tokens: int = Field(default=256, ge=2)
    """Tokens of that text in each step."""
    kl_pool: int = Field(default=10_000, ge=2)
    """Tokens to sample, or to read of `kl_text`; steps go through them in an order drawn by `seed`."""
    masked_kl_weight: float = Field(default=0.0, ge=0)
    """Price of a nat of KL(base ‖ adapted) on the learned tokens themselves, the right token left out of both (Mask
    the Target). Not for methods that move the base weights."""
    token_weight: Literal["none", "eaft", "stm", "dft"] = "none"
    """Weight of a token in the loss. `eaft`: the entropy of the model's 20 likeliest tokens, as a share of its
    maximum. `dft`: the right token's probability. `stm`: 0 where the base's perplexity is above 2.5."""
    replay: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training rows that the base model writes (self-replay)."""
    drift_tokens: int = Field(default=0, ge=0)
    """Tokens of prose and of code on which the drift from the base is measured at the end; 0 measures none. 512 in
    `hiplora train`. Not for methods that move the base weights."""
    max_drift: float | None = Field(default=None, gt=0)
    """Largest drift, in nats per token, measured as for `patience`; the last checkpoint below it is the result."""
    patience: int | None = Field(default=None, ge=1)
    """The training ends when the held-out loss, measured every `eval_every` steps or ten times, was not lowered so
    many times in a row. The adapter is the one with the lowest, also of a run that is not ended."""
    push_to_hub: str | None = Field(default=None, pattern=r"^[\w.-]+/[\w.-]+$")
    """Private hub repository that gets the finished adapter."""
    start_from: PathText | None = Field(default=None, min_length=1)
    """Folder of a finished adapter of the same method to train on."""
    widen: bool = True
    """With `start_from` and HiP-LoRA's function-aware preset: protect what the finished task depends on too, measured
    on text that the adapted model writes. The adapter's rank grows by `r`. False: train the same factors on."""

    @model_validator(mode="before")
    @classmethod
    def _steps_or_epochs(cls, value: Any) -> Any:
        if not isinstance(value, dict) or value.get("epochs") is None:
            return value
        if value.get("steps") is not None:
            raise ValueError("give either `steps` or `epochs`, not both")
        return {**value, "steps": None}

    @model_validator(mode="after")
    def _check(self) -> "TrainSettings":
        for name in ("kl_text", "kl_tokens", "kl_pool"):
            if not self.kl_weight and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"`{name}` has no use with `kl_weight: 0`; remove it, or set a price")
        if self.steps is None and self.epochs is None:
            raise ValueError("give `steps` or `epochs`")
        if self.max_drift is not None and self.drift_tokens < 2:
            raise ValueError("`max_drift` needs `drift_tokens`, for example 512")
        return self

    def warmup_steps(self, steps: int) -> int:
        """Return the number of warm-up steps of a training of so many steps."""
        return math.ceil(self.warmup_ratio * steps)


class TrainRecipe(Block):
    """One training run, in full: a model, data, a method, how to train, a seed."""

    model: PathText = Field(min_length=1)
    """Base model: `smollm2-135m` (fetched without a hub), a folder, or a name on the Hugging Face hub."""
    data: DataSettings
    """What to train on; a bare string is short for {path: …}, or for {hub: …} where it reads owner/name."""
    method: AnyMethod = Field(
        default=METHODS["hiplora"](),
        description=f"{', '.join(METHODS)}: one of them, alone or as {{name: …}} with its settings.",
    )
    train: TrainSettings = Field(default=TrainSettings())
    """How to train."""
    seed: int = Field(default=42, ge=0, lt=2**32)
    """Seed of the adapter's start, the order of the rows and dropout."""
    out: PathText | None = Field(default=None, min_length=1)
    """Output folder, where the command line names none."""

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        return expand_short_forms(value) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _check(self) -> "TrainRecipe":
        train, held_out = self.train, self.data.has_held_out
        if train.eval_every is not None and not held_out and train.max_drift is None:
            raise ValueError("`train.eval_every` needs `data.held_out`, `data.held_out_fraction` or `train.max_drift`")
        if train.patience is not None and not held_out:
            raise ValueError("`train.patience` needs `data.held_out` or `data.held_out_fraction`")
        if train.load_in_4bit and self.method.moves_base:
            why = f"holds weights that {self.method.name} moves"
            raise ValueError(f"`train.load_in_4bit` {why}; remove it, or use another method")
        comparisons = [name for name in ("kl_weight", "masked_kl_weight", "max_drift") if getattr(train, name)]
        if self.method.moves_base and comparisons:
            why = f"compares with the base model, whose weights {self.method.name} moves"
            raise ValueError(f"`train.{comparisons[0]}` {why}; remove it, or use another method")
        if self.widens and train.max_drift is not None:
            why = "compares with the base, which a widened training changes"
            raise ValueError(f"`train.max_drift` {why}; remove it, or set `train.widen: false`")
        self.method.check_training(train)
        return self

    @property
    def widens(self) -> bool:
        """Whether the training carries on from an adapter and protects that adapter's task too."""
        return bool(self.train.start_from and self.train.widen and getattr(self.method, "widens", False))

    def inputs(self) -> dict[str, str | None]:
        """Return the files, folders and hub names that the training reads, by field."""
        return {
            "model": self.model,
            "data.path": self.data.path,
            "data.held_out": self.data.held_out,
            "train.kl_text": self.train.kl_text,
            "method.calibration_text": getattr(self.method, "calibration_text", None),
            "train.start_from": self.train.start_from,
            **{f"data.mix {name}": name for name in self.data.mix},
        }

    def values(self) -> dict[str, Any]:
        """Return the recipe as plain values, every default filled in, without its output folder."""
        values = self.model_dump(mode="json", exclude={"out"})
        values["method"] = {"name": self.method.name, **values["method"]}
        return values


def expand_short_forms(value: Mapping[str, Any]) -> dict[str, Any]:
    """Expand `method: lora` and `data: rows.jsonl` or `data: owner/name` into blocks; HiP-LoRA needs no name."""
    value = dict(value)
    if isinstance(value.get("data"), (str, os.PathLike)):
        data = os.fspath(value["data"])
        name, _, config = data.partition(":")
        value["data"] = {"hub": name, "hub_config": config or None} if is_hub_name(data) else {"path": data}
    if isinstance(value.get("method"), str):
        value["method"] = {"name": value["method"]}
    if isinstance(value.get("method"), dict):
        value["method"] = {"name": "hiplora", **value["method"]}
    return value
