"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512), from PEFT.

PEFT's rank allocator is called as PEFT documents it: after the optimizer's step, before the gradients are cleared.
"""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from hiplora.errors import ConfigError
from hiplora.training.method import ADAPTER, LowRank, Penalty, Session

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor

    from hiplora.training.recipe import TrainSettings

ALLOCATION_FILE = "adalora.pt"
AVERAGES = ("exp_avg_ipt", "exp_avg_unc")


class AdaLoraMethod(LowRank):
    """AdaLoRA, from PEFT: prunes a higher rank to `r` on average (`target_r` in PEFT), over all modules together."""

    title = "AdaLoRA"
    summary = "A low-rank update whose rank was cut, module by module, where it mattered least."
    kind = "an AdaLoRA adapter"
    not_of_peft = ("name", "r", "init_r", "rank_pattern", "alpha_pattern", "tinit", "tfinal", "deltaT")

    name: Literal["adalora"] = "adalora"
    """The method."""
    init_r: int | None = Field(default=None, ge=2)
    """Rank of every module before pruning, above `r`; 1.5·r if empty. The update is scaled by lora_alpha / init_r."""
    tinit: int | None = Field(default=None, ge=0)
    """Steps before the pruning; a tenth of all if empty."""
    tfinal: int | None = Field(default=None, ge=1)
    """Steps after it, with the ranks that are left; a fifth of all if empty."""
    deltaT: int | None = Field(default=None, ge=1)
    """Steps between two allocations; a hundredth of all if empty, from 1 to 10."""
    beta1: float = Field(default=0.85, gt=0, lt=1)
    """Decay of the moving average of a parameter's importance."""
    beta2: float = Field(default=0.85, gt=0, lt=1)
    """Decay of the moving average of its uncertainty."""
    orth_reg_weight: float = Field(default=0.5, ge=0)
    """Price of factors that are not orthonormal, added to the loss once a step."""

    @model_validator(mode="after")
    def _something_is_pruned(self) -> "AdaLoraMethod":
        if self.first_rank <= self.r:
            raise ValueError(f"`init_r` {self.first_rank} must be above `r` {self.r}, the mean rank that is left")
        if self.rank_pattern or self.alpha_pattern:
            raise ValueError("adalora gives modules their ranks; remove `rank_pattern` and `alpha_pattern`")
        return self

    @property
    def first_rank(self) -> int:
        """Rank of every module before the pruning."""
        return self.init_r if self.init_r is not None else math.ceil(1.5 * self.r)

    def schedule(self, steps: int) -> dict[str, Any]:
        """Return when ranks are pruned, under PEFT's names; ConfigError if no step is left to prune in."""
        shares = {
            "tinit": round(0.1 * steps),
            "tfinal": max(round(0.2 * steps), 1),
            "deltaT": min(max(steps // 100, 1), 10),
        }
        values = {
            name: share if getattr(self, name) is None else getattr(self, name) for name, share in shares.items()
        }
        if values["tinit"] + values["tfinal"] >= steps:
            what = f"tinit {values['tinit']} and tfinal {values['tfinal']}"
            raise ConfigError(f"adalora: {what} leave none of {steps} steps to prune in; lower them, or train longer")
        return {"total_step": steps, **values}

    def check_training(self, train: "TrainSettings") -> None:
        """Check that the ranks can be pruned in the steps of the training."""
        if train.start_from is not None:
            raise ValueError("`train.start_from`: ranks that adalora pruned cannot be trained on; use lora")
        if train.steps is not None:
            self.schedule(train.steps)

    def peft_config(self, steps: int | None = None) -> "PeftConfig":
        """Return an AdaLoRA configuration with its schedule."""
        from peft import AdaLoraConfig

        if steps is None:
            raise ConfigError("adalora prunes its ranks while it trains, which only `hiplora train` does; use lora")
        values = {**self.schedule(steps), **self.settings(), "init_r": self.first_rank, "target_r": self.r}
        return AdaLoraConfig(task_type="CAUSAL_LM", **values)

    def session(self, model: "PeftModel", sequences: int) -> Session:
        """Prune while training."""
        return AdaLoraSession(model, self.orth_reg_weight)


class AdaLoraSession(Session):
    """AdaLoRA while it trains. Checkpoints keep the masked ranks too: PEFT may bring them back."""

    def __init__(self, model: "PeftModel", price: float):
        super().__init__(model)
        tuner: Any = model.base_model
        self._tuner, self._config = tuner, tuner.peft_config[ADAPTER]
        self.penalties = [Penalty("orthogonality", price, orthogonality)] if price else []

    def after_step(self, step: int, last: bool) -> None:
        """Let PEFT weigh and prune the ranks; it counts from 0."""
        self._tuner.update_and_allocate(step - 1)

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Mask the ranks that are pruned for now: the adapter that is returned lacks them."""
        import torch

        scales = [p for name, p in self.model.named_parameters() if f"lora_E.{ADAPTER}" in name]
        unmasked = [p.detach().clone() for p in scales]
        if self._config.rank_pattern:
            self._tuner.rankallocator.mask_using_rank_pattern(self._tuner.model, self._config.rank_pattern)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, values in zip(scales, unmasked, strict=True):
                    parameter.copy_(values)

    def save(self, folder: Path) -> None:
        """Save the adapter at its full ranks, the mask of ranks that are left, and the importance estimates."""
        import torch

        with self._unpruned():
            super().save(folder)
        averages = {kind: getattr(self._tuner.rankallocator, kind) for kind in AVERAGES}
        torch.save({"rank_pattern": self._config.rank_pattern, **averages}, folder / ALLOCATION_FILE)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        import torch

        with self._unpruned():
            super().load(folder)
        stored = torch.load(folder / ALLOCATION_FILE, map_location=self.model.device, weights_only=True)
        self._config.rank_pattern = stored.pop("rank_pattern")
        zeros = {name: torch.zeros_like(value) for name, value in stored[AVERAGES[0]].items()}
        vars(self._tuner.rankallocator).update(ipt=zeros, **stored)

    @contextlib.contextmanager
    def _unpruned(self) -> Iterator[None]:
        """Have PEFT save and load whole tensors, without pruning them."""
        pattern, self._config.rank_pattern = self._config.rank_pattern, None
        try:
            yield
        finally:
            self._config.rank_pattern = pattern


def orthogonality(model: Any, step: int) -> "Tensor":
    """Return how far AdaLoRA's factors are from orthonormal: the mean of ‖AAᵀ − I‖ and ‖BᵀB − I‖ over the modules.

    PEFT adds it to the loss of every micro-batch that asks the model for its loss; TRL's trainer does not.
    """
    import torch
    from peft.tuners.adalora import AdaLoraLayer

    layers: Any = [module for module in model.modules() if isinstance(module, AdaLoraLayer)]
    pairs = [(layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]) for layer in layers if ADAPTER in layer.lora_A]
    grams = [gram for A, B in pairs for gram in (A @ A.T, B.T @ B)]
    return torch.stack([torch.linalg.norm(gram - torch.eye(len(gram), device=gram.device)) for gram in grams]).mean()
