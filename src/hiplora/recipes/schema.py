"""The schema of a training recipe: every field with its type, its default and what it is for.

The defaults are the paper's (Appendix B), so an almost empty recipe is the paper's setting. A model of this
file holds what the user wrote; nothing here touches a disk or imports torch.
"""

import os
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from hiplora.recipes.methods import METHODS, AdaLoraMethod, Block, HipLoraMethod, Method

DEFAULT_STEPS = 2000

PathText = Annotated[
    str, BeforeValidator(lambda value: os.fspath(value) if isinstance(value, os.PathLike) else value)
]
Format = Literal[
    "auto",
    "alpaca",
    "prompt_completion",
    "question_answer",
    "query_response",
    "multiple_choice",
    "messages",
    "text",
]


class DataSettings(Block):
    """What to train on: a file (JSONL, JSON, parquet, JSON may be gzipped) or a data set of the hub."""

    path: PathText | None = Field(
        default=None,
        min_length=1,
        description="File with the training rows: .jsonl, .json, .jsonl.gz, .json.gz or .parquet. "
        "In a recipe, relative to the recipe's folder; with --set, to the current folder.",
    )
    hub: str | None = Field(
        default=None,
        min_length=1,
        description="Name of a data set on the Hugging Face hub, instead of `path`.",
    )
    hub_config: str | None = Field(default=None, description="Configuration (subset) of the hub data set.")
    split: str | None = Field(
        default=None,
        min_length=1,
        description="Split of the hub data set, `train` if empty; only with `hub`.",
    )
    format: Format = Field(
        default="auto",
        description="Shape of a row. `alpaca`: instruction, input (optional), output. `prompt_completion`: prompt and "
        "completion (or response). `question_answer`: question and answer. `query_response`: query and response, as "
        "MetaMathQA has them. `multiple_choice`: question, choices and the right one's index as answer. `messages`: a "
        "list of {role, content}. `text`: plain text. `auto` reads it off the first row.",
    )
    template: Literal["instruction", "verbatim", "direct", "step_by_step", "chat"] | None = Field(
        default=None,
        description="How a prompt is worded: `instruction` is the project's Alpaca-style wording (default for alpaca, "
        "question_answer and query_response rows), `verbatim` uses the prompt as it stands (default for "
        "prompt_completion), `direct` asks as hiplora's own evaluation tasks do, for the letter of the choice or the "
        "final number alone (default for multiple_choice; for question_answer rows too), `step_by_step` asks for the "
        "derivation, as the task gsm8k_solution does (question_answer and query_response rows), `chat` puts the row "
        "through the tokenizer's chat template. Not for messages and text rows.",
    )
    max_characters: int | None = Field(
        default=None,
        ge=1,
        description="Leave out rows whose question and answer, a space between them, have more characters.",
    )
    limit: int | None = Field(
        default=None, ge=1, description="Use at most this many rows, the first ones that are not left out."
    )
    learn_prompt: bool = Field(
        default=False, description="Learn the tokens of prompts too, and not only those of responses."
    )
    held_out: PathText | None = Field(
        default=None,
        min_length=1,
        description="File with rows that are not trained on; their loss is measured before and after training.",
    )
    held_out_fraction: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Instead of `held_out`: keep this share of the rows back. Which rows depends on the data alone, "
        "not on `seed`, so that runs with several seeds are measured on the same rows.",
    )
    held_out_limit: int | None = Field(
        default=None, ge=1, description="Measure on at most this many held-out rows."
    )

    @model_validator(mode="after")
    def _one_source(self) -> "DataSettings":
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either `path` (a file) or `hub` (a data set of the hub)")
        for name in ("split", "hub_config"):
            if self.hub is None and getattr(self, name) is not None:
                raise ValueError(f"`{name}` applies to `hub` only; a file has no splits: remove it")
        if self.held_out is not None and self.held_out_fraction is not None:
            raise ValueError("give either `held_out` (a file) or `held_out_fraction` (a share of the rows)")
        if self.held_out_limit is not None and not self.has_held_out:
            raise ValueError("`held_out_limit` needs `held_out` or `held_out_fraction`")
        if self.template is not None and self.format in ("messages", "text"):
            raise ValueError(f"`template` does not apply to {self.format} rows; remove it")
        if self.learn_prompt and (self.template == "chat" or self.format == "messages"):
            raise ValueError("`learn_prompt` does not apply to conversations; remove it")
        return self

    @property
    def has_held_out(self) -> bool:
        """Whether any rows are kept back for measuring."""
        return self.held_out is not None or self.held_out_fraction is not None


class TrainSettings(Block):
    """How to train: AdamW, a linear warm-up, then a learning rate that stays or falls."""

    lr: float = Field(
        default=2e-4,
        gt=0,
        description="Peak learning rate. The paper's value is lost from its text; 2e-4, usual for LoRA, "
        "is our reading.",
    )
    steps: int | None = Field(
        default=DEFAULT_STEPS,
        ge=1,
        description="Optimizer steps; 2000 unless `epochs` is given. Give one of the two.",
    )
    epochs: float | None = Field(default=None, gt=0, description="Passes over the data, instead of `steps`.")
    batch_size: int = Field(default=4, ge=1, description="Sequences in one forward pass.")
    gradient_accumulation: int = Field(
        default=32,
        ge=1,
        description="Forward passes per optimizer step; batch_size × gradient_accumulation is the global batch (128).",
    )
    max_length: int = Field(
        default=2048,
        ge=2,
        description="Tokens in a sequence. Longer responses are cut at the end; rows whose prompt alone fills it are "
        "left out; both are counted and reported. Plain text is cut into pieces of this length.",
    )
    packing: bool = Field(
        default=True,
        description="Put several rows into one sequence of max_length; rows never attend to each other.",
    )
    lr_scheduler: Literal["constant", "cosine"] = Field(
        default="constant",
        description="What follows the warm-up: `constant` stays at the peak, `cosine` falls along half a cosine, to 0 "
        "at the last step.",
    )
    warmup_ratio: float = Field(
        default=0.03, ge=0, lt=1, description="Share of the steps over which the learning rate rises."
    )
    weight_decay: float = Field(
        default=0.01, ge=0, description="AdamW's weight decay; only the adapter is trained."
    )
    max_grad_norm: float = Field(
        default=1.0, ge=0, description="Clip the gradient to this norm; 0 switches clipping off."
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto",
        description="Precision of the base model and of the computation; the adapter stays in fp32. `auto` is bf16, "
        "the paper's, on a GPU that has it, and fp32 elsewhere. fp16 needs a GPU.",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="Recompute activations in the backward pass: less memory, more time.",
    )
    log_every: int = Field(default=1, ge=1, description="Steps between two rows of metrics.jsonl.")
    save_every: int = Field(
        default=100, ge=1, description="Steps between two checkpoints; the last step always has one."
    )
    keep_checkpoints: int = Field(default=1, ge=1, description="Checkpoints to keep, the newest.")
    eval_every: int | None = Field(
        default=None,
        ge=1,
        description="Measure the held-out loss every so many steps too, not only before and after.",
    )
    kl_weight: float = Field(
        default=0.0,
        ge=0,
        description="Price of a nat of KL(base ‖ adapted) per token, measured once a step on other text and added to "
        "the loss; 0 adds nothing. Not for methods that move the base weights.",
    )
    kl_text: PathText | None = Field(
        default=None,
        min_length=1,
        description="Text file or training data to measure it on, instead of text sampled from the base model. In a "
        "recipe, relative to the recipe's folder; with --set, to the current folder.",
    )
    kl_tokens: int = Field(default=256, ge=2, description="Tokens of that text that a step reads.")
    kl_pool: int = Field(
        default=10_000,
        ge=2,
        description="Tokens to sample, or to read of `kl_text`; steps go through them in an order drawn by `seed`.",
    )
    start_from: PathText | None = Field(
        default=None,
        min_length=1,
        description="Folder of a finished adapter, made with the same method and settings, whose weights the training "
        "carries on from. In a recipe, relative to the recipe's folder; with --set, to the current folder.",
    )

    @model_validator(mode="before")
    @classmethod
    def _steps_or_epochs(cls, value: Any) -> Any:
        if not isinstance(value, dict) or value.get("epochs") is None:
            return value
        if value.get("steps") is not None:
            raise ValueError("give either `steps` or `epochs`, not both")
        return {**value, "steps": None}

    @model_validator(mode="after")
    def _kl_has_a_price(self) -> "TrainSettings":
        for name in ("kl_text", "kl_tokens", "kl_pool"):
            if not self.kl_weight and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"`{name}` has no use with `kl_weight: 0`; remove it, or set a price")
        return self

    @model_validator(mode="after")
    def _some_length(self) -> "TrainSettings":
        if self.steps is None and self.epochs is None:
            raise ValueError("give `steps` or `epochs`")
        return self


class TrainRecipe(Block):
    """One training run, in full: a model, data, a method, how to train, a seed."""

    model: PathText = Field(
        min_length=1,
        description="Base model: `smollm2-135m` (fetched without a hub), a folder, or a name on the Hugging Face hub.",
    )
    data: DataSettings = Field(description="What to train on; a bare string is short for {path: …}.")
    method: Method = Field(
        default=HipLoraMethod(),
        description=f"{', '.join(METHODS)}: one of them, alone or as {{name: …}} with its settings.",
    )
    train: TrainSettings = Field(default=TrainSettings(), description="How to train.")
    seed: int = Field(
        default=42,
        ge=0,
        lt=2**32,
        description="Seed of the adapter's start, the order of the rows and dropout.",
    )
    out: PathText | None = Field(
        default=None, min_length=1, description="Output folder, where the command line names none."
    )

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        return expand_short_forms(value) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _evaluation_has_data(self) -> "TrainRecipe":
        if self.train.eval_every is not None and not self.data.has_held_out:
            raise ValueError("`train.eval_every` needs `data.held_out` or `data.held_out_fraction`")
        return self

    @model_validator(mode="after")
    def _the_base_is_there_to_compare_with(self) -> "TrainRecipe":
        if self.train.kl_weight and self.method.moves_base:
            raise ValueError(
                f"`train.kl_weight` compares with the base model, whose weights {self.method.name} moves; remove it, "
                "or use another method"
            )
        return self

    @model_validator(mode="after")
    def _ranks_can_be_pruned(self) -> "TrainRecipe":
        steps = self.train.steps
        if isinstance(self.method, AdaLoraMethod) and steps is not None and self.train.start_from is None:
            self.method.schedule(steps)
        return self

    @model_validator(mode="after")
    def _every_client_has_a_turn(self) -> "TrainRecipe":
        clients, passes = getattr(self.method, "clients", 1), self.train.gradient_accumulation
        if passes % clients:
            raise ValueError(
                f"`train.gradient_accumulation` {passes} is no multiple of `method.clients` {clients}: the forward "
                "passes of a step are the clients' in turn; change one of them"
            )
        return self


def expand_short_forms(value: dict[str, Any]) -> dict[str, Any]:
    """Write `method: lora` and `data: rows.jsonl` out as blocks; a method without a name is HiP-LoRA."""
    value = dict(value)
    if isinstance(value.get("data"), (str, os.PathLike)):
        value["data"] = {"path": os.fspath(value["data"])}
    if isinstance(value.get("method"), str):
        value["method"] = {"name": value["method"]}
    if isinstance(value.get("method"), dict):
        value["method"] = {"name": "hiplora", **value["method"]}
    return value
