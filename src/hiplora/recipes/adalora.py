"""AdaLoRA's settings in a recipe, and the schedule of its pruning."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from hiplora.recipes.low_rank import LowRank

START_SHARE, FINAL_SHARE = 0.1, 0.2  # of the steps, before and after the pruning
ALLOCATIONS, LONGEST = 100, 10  # aim at so many allocations, no more than so many steps apart


@dataclass(frozen=True)
class Schedule:
    """When ranks are pruned, in optimizer steps, under PEFT's names."""

    total_step: int
    tinit: int
    tfinal: int
    deltaT: int


class AdaLoraMethod(LowRank):
    """AdaLoRA, from PEFT: starts with a higher rank and prunes what matters least, over all modules together.

    `r` is the rank that is left on average; PEFT's name for it, `target_r`, is understood too.
    """

    name: Literal["adalora"] = Field(default="adalora", description="The method.")
    init_r: int | None = Field(
        default=None,
        ge=2,
        description="Rank of every module before the pruning, above `r`, the mean rank after it (`target_r` means the "
        "same); 1.5·r if empty. The update is scaled by lora_alpha / init_r.",
    )
    tinit: int | None = Field(
        default=None, ge=0, description="Steps before the pruning; a tenth of all if empty."
    )
    tfinal: int | None = Field(
        default=None,
        ge=1,
        description="Steps after it, with the ranks that are left; a fifth of all if empty.",
    )
    deltaT: int | None = Field(
        default=None,
        ge=1,
        description="Steps between two allocations of ranks; a hundredth of all if empty, from 1 to 10.",
    )
    beta1: float = Field(
        default=0.85, gt=0, lt=1, description="How slowly the estimate of a parameter's importance moves."
    )
    beta2: float = Field(
        default=0.85, gt=0, lt=1, description="How slowly the estimate of its uncertainty moves."
    )
    orth_reg_weight: float = Field(
        default=0.5,
        ge=0,
        description="Price of factors that are not orthonormal, added to the loss once a step.",
    )

    @property
    def first_rank(self) -> int:
        """Rank of every module before the pruning."""
        return self.init_r if self.init_r is not None else math.ceil(1.5 * self.r)

    def schedule(self, steps: int) -> Schedule:
        """Return when ranks are pruned in a training of so many steps.

        Raises:
            ValueError: no step is left to prune in.
        """
        tinit = self.tinit if self.tinit is not None else round(START_SHARE * steps)
        tfinal = self.tfinal if self.tfinal is not None else max(round(FINAL_SHARE * steps), 1)
        every = self.deltaT if self.deltaT is not None else min(max(steps // ALLOCATIONS, 1), LONGEST)
        if tinit + tfinal >= steps:
            raise ValueError(
                f"adalora: tinit {tinit} and tfinal {tfinal} leave none of {steps} steps to prune in; lower them, or "
                "train longer"
            )
        return Schedule(steps, tinit, tfinal, every)

    @model_validator(mode="before")
    @classmethod
    def _target_is_r(cls, value: Any) -> Any:
        if not isinstance(value, dict) or "target_r" not in value:
            return value
        rest = {name: given for name, given in value.items() if name != "target_r"}
        if rest.setdefault("r", value["target_r"]) != value["target_r"]:
            raise ValueError(f"`target_r` {value['target_r']} and `r` {rest['r']} mean the same; give one")
        return rest

    @model_validator(mode="after")
    def _something_is_pruned(self) -> "AdaLoraMethod":
        if self.first_rank <= self.r:
            raise ValueError(
                f"`init_r` {self.first_rank} must be above `r` {self.r}, the mean rank that is left"
            )
        for name in ("rank_pattern", "alpha_pattern"):
            if getattr(self, name):
                raise ValueError(
                    f"`{name}` has no use with adalora, which gives modules their ranks; remove it"
                )
        return self
