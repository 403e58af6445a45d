"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512), from PEFT.

PEFT's rank allocator is called as PEFT documents it: after the optimizer's step, before the gradients are cleared.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from hiplora.errors import ConfigError
from hiplora.training.method import ADAPTER, LowRank, Session, replaced

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor

    from hiplora.training.recipe import TrainSettings

START_SHARE, FINAL_SHARE = 0.1, 0.2  # of the steps, before and after the pruning
ALLOCATIONS, LONGEST = 100, 10  # aim at so many allocations, at most so many steps apart
ALLOCATION_FILE = "adalora.safetensors"
AVERAGES = ("exp_avg_ipt", "exp_avg_unc")
SCHEDULE = ("total_step", "tinit", "tfinal", "deltaT")


class AdaLoraMethod(LowRank):
    """AdaLoRA, from PEFT: starts with a higher rank and prunes what matters least, over all modules together.

    `r` is the rank that is left on average; PEFT's name for it, `target_r`, is understood too.
    """

    title: ClassVar[str] = "AdaLoRA"
    summary: ClassVar[str] = (
        "A low-rank update whose rank was cut, module by module, where it mattered least."
    )
    kind: ClassVar[str | None] = "an AdaLoRA adapter"
    steering: ClassVar[tuple[str, ...]] = ("lora_dropout", "orth_reg_weight")
    not_of_peft: ClassVar[tuple[str, ...]] = (
        "name",
        "r",
        "init_r",
        "rank_pattern",
        "alpha_pattern",
        *SCHEDULE,
    )

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
        default=0.85, gt=0, lt=1, description="Decay of the moving average of a parameter's importance."
    )
    beta2: float = Field(
        default=0.85, gt=0, lt=1, description="Decay of the moving average of its uncertainty."
    )
    orth_reg_weight: float = Field(
        default=0.5,
        ge=0,
        description="Price of factors that are not orthonormal, added to the loss once a step.",
    )

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

    @property
    def first_rank(self) -> int:
        """Rank of every module before the pruning."""
        return self.init_r if self.init_r is not None else math.ceil(1.5 * self.r)

    def schedule(self, steps: int) -> dict[str, int]:
        """Return when ranks are pruned in a training of so many steps, under PEFT's names.

        Raises:
            ConfigError: no step is left to prune in.
        """
        tinit = self.tinit if self.tinit is not None else round(START_SHARE * steps)
        tfinal = self.tfinal if self.tfinal is not None else max(round(FINAL_SHARE * steps), 1)
        every = self.deltaT if self.deltaT is not None else min(max(steps // ALLOCATIONS, 1), LONGEST)
        if tinit + tfinal >= steps:
            raise ConfigError(
                f"adalora: tinit {tinit} and tfinal {tfinal} leave none of {steps} steps to prune in; lower them, or "
                "train longer"
            )
        return {"total_step": steps, "tinit": tinit, "tfinal": tfinal, "deltaT": every}

    def check_training(self, train: "TrainSettings") -> None:
        """Check that the ranks can be pruned in the steps of the training."""
        if train.steps is not None and train.start_from is None:
            self.schedule(train.steps)

    def peft_config(self, steps: int | None = None) -> "PeftConfig":
        """Return an AdaLoRA configuration with its schedule."""
        if steps is None:
            raise ConfigError(
                "method adalora prunes its ranks while it trains, which only `hiplora train` does; use lora here"
            )
        return self._config(self.schedule(steps))

    def continued_config(self, given: Mapping[str, Any]) -> "PeftConfig":
        """Return the configuration with the schedule by which the given adapter was pruned: nothing is pruned more."""
        return self._config({name: given[name] for name in SCHEDULE})

    def load_tensors(self, model: "PeftModel", tensors: dict[str, "Tensor"], given: Mapping[str, Any]) -> Any:
        """Give the new adapter the ranks that the given one was left with, then its tensors."""
        if pattern := given.get("rank_pattern"):
            _take_ranks(model, pattern)
        with _resized(model):
            return super().load_tensors(model, tensors, given)

    def session(self, model: "PeftModel", sequences: int, carries_on: bool) -> Session:
        """Prune, unless an adapter is carried on."""
        return AdaLoraSession(model, self.orth_reg_weight, prunes=not carries_on)

    def _config(self, schedule: Mapping[str, int]) -> "PeftConfig":
        from peft import AdaLoraConfig

        return AdaLoraConfig(
            task_type="CAUSAL_LM", init_r=self.first_rank, target_r=self.r, **schedule, **self.settings()
        )


class AdaLoraSession(Session):
    """AdaLoRA while it trains. Checkpoints hold what is masked for now too: PEFT may bring it back."""

    def __init__(self, model: "PeftModel", orthogonality: float, prunes: bool):
        super().__init__(model)
        self.penalties = [Orthogonality(orthogonality)] if orthogonality else []
        self._prunes = prunes

    def after_optimizer(self, step: int) -> None:
        """Let PEFT weigh and prune the ranks."""
        if self._prunes:
            tuner: Any = self.model.base_model
            tuner.update_and_allocate(step)

    def save(self, folder: Path) -> None:
        """Save the adapter at its full ranks, the mask of ranks that are left, and the importance estimates."""
        import torch
        from safetensors.torch import save_file

        with _resized(self.model):
            super().save(folder)
        config: Any = self.model.peft_config[ADAPTER]
        state = {f"kept.{name}": torch.tensor(mask) for name, mask in (config.rank_pattern or {}).items()}
        for kind in AVERAGES:
            for name, value in getattr(self._allocator, kind).items():
                state[f"{kind}.{name}"] = value.contiguous()
        save_file(state, folder / ALLOCATION_FILE)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        import torch
        from safetensors.torch import load_file

        with _resized(self.model):
            super().load(folder)
        stored: dict[str, dict[str, Tensor]] = {kind: {} for kind in ("kept", *AVERAGES)}
        for key, value in load_file(folder / ALLOCATION_FILE, device=str(self.model.device)).items():
            kind, _, name = key.partition(".")
            stored[kind][name] = value
        for kind in AVERAGES:
            setattr(self._allocator, kind, stored[kind])
        self._allocator.ipt = {name: torch.zeros_like(value) for name, value in stored[AVERAGES[0]].items()}
        config: Any = self.model.peft_config[ADAPTER]
        config.rank_pattern = {name: mask.tolist() for name, mask in stored["kept"].items()} or None

    @property
    def _allocator(self) -> Any:
        tuner: Any = self.model.base_model
        return tuner.rankallocator


class Orthogonality:
    """AdaLoRA's price of factors that are not orthonormal: the mean of ‖AAᵀ − I‖ and ‖BᵀB − I‖ over the modules.

    PEFT adds it to the loss of every micro-batch that asks the model for its loss; TRL's trainer does not.
    """

    name = "orthogonality"

    def __init__(self, weight: float):
        self.weight = weight

    def __call__(self, model: Any, step: int) -> "Tensor":
        """Return the price, a scalar with its gradient."""
        import torch
        from peft.tuners.adalora import AdaLoraLayer

        terms = []
        for layer in model.modules():
            if isinstance(layer, AdaLoraLayer) and ADAPTER in layer.lora_A:
                A, B = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
                for gram in (A @ A.T, B.T @ B):
                    terms.append(torch.linalg.norm(gram - torch.eye(len(gram), device=gram.device)))
        return torch.stack(terms).mean()


def _take_ranks(model: "PeftModel", pattern: Mapping[str, Any]) -> None:
    """Give an unpruned adapter the ranks of a `rank_pattern`; its scaling stays that of its first rank."""
    from torch import nn

    ranks = {name.partition(".lora_E")[0]: sum(kept) for name, kept in pattern.items()}
    inner: Any = model.base_model.model
    for name, module in inner.named_modules():
        if name in ranks:
            rank = module.r[ADAPTER] = ranks[name]
            for factors in (module.lora_A, module.lora_E):
                factors[ADAPTER] = nn.Parameter(factors[ADAPTER].data[:rank].clone())
            module.lora_B[ADAPTER] = nn.Parameter(module.lora_B[ADAPTER].data[:, :rank].clone())
    config: Any = model.peft_config[ADAPTER]
    config.rank_pattern = dict(pattern)


@contextlib.contextmanager
def _resized(model: "PeftModel") -> Iterator[None]:
    """Have PEFT save and load tensors in the shapes that the model has: it would prune them once more."""
    with replaced(model.peft_config[ADAPTER], rank_pattern=None):
        yield
