"""What every method of a recipe has."""

from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Block(BaseModel):
    """Base of every block: unknown fields are errors, values are not guessed into other types, nothing changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Targeted(Block):
    """What every method has: the modules that it adapts, under PEFT's name.

    A method that `moves_base` takes the product of its first factors out of the base weights when it starts.
    """

    moves_base: ClassVar[bool] = False

    target_modules: list[str] | str = Field(
        default=list(ATTENTION_PROJECTIONS),
        min_length=1,
        description="Modules to adapt: a list of names, one regular expression, or `all-linear`.",
    )


class LowRank(Targeted):
    """What every method with low-rank factors has, under PEFT's names."""

    r: int = Field(
        default=16, ge=1, description="Rank of the low-rank factors (of the residual channel, for HiP-LoRA)."
    )
    lora_alpha: int | float = Field(
        default=32, gt=0, description="The low-rank update is scaled by lora_alpha / r."
    )
    lora_dropout: float = Field(
        default=0.05, ge=0, lt=1, description="Dropout on the input of the low-rank update."
    )
    exclude_modules: list[str] | str | None = Field(
        default=None, description="Modules to leave alone, although target_modules names them."
    )
    layers_to_transform: list[int] | int | None = Field(
        default=None, description="Indices of the layers to adapt; all if empty."
    )
    layers_pattern: list[str] | str | None = Field(
        default=None, description="Name of the model's list of layers, where layers_to_transform needs it."
    )
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default={}, description="Module name or pattern → its own r."
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={}, description="Module name or pattern → its own lora_alpha."
    )
    modules_to_save: list[str] | None = Field(
        default=None, description="Modules to train in full and save with the adapter."
    )
