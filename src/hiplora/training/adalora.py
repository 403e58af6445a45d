"""AdaLoRA while it trains: its pruning after every optimizer step, its price once a step, and checkpoints of both.

PEFT's rank allocator is called as PEFT documents it: after the optimizer's step and before the gradients are cleared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel
from peft.tuners.adalora import AdaLoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hiplora.training.adapters import ADAPTER
from hiplora.training.trainer import RecordingTrainer

ALLOCATION_FILE = "adalora.safetensors"
_AVERAGES = ("exp_avg_ipt", "exp_avg_unc")


class Orthogonality:
    """AdaLoRA's price of factors that are not orthonormal: the mean of ‖AAᵀ − I‖ and ‖BᵀB − I‖ over the modules."""

    name = "orthogonality"

    def __init__(self, weight: float):
        self.weight = weight

    def __call__(self, model: Any, step: int) -> Tensor:
        """Return the price, a scalar with its gradient."""
        terms = []
        for layer in _layers(model):
            A, B = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
            for gram in (A @ A.T, B.T @ B):
                terms.append(torch.linalg.norm(gram - torch.eye(*gram.shape, out=torch.empty_like(gram))))
        return torch.stack(terms).mean()


class AdaLoraTrainer(RecordingTrainer):
    """A RecordingTrainer of AdaLoRA; `prunes` is False where the ranks are those of an adapter that is carried on.

    Its checkpoints have what is pruned for now, too: PEFT only masks it, and may let it come back.
    """

    def __init__(self, *args: Any, prunes: bool = True, penalties: Sequence[Any] = (), **kwargs: Any) -> None:
        """Take RecordingTrainer's arguments, and whether to prune."""
        config = kwargs["peft_config"]
        super().__init__(*args, penalties=[*penalties, Orthogonality(config.orth_reg_weight)], **kwargs)
        if prunes:
            self.add_callback(_Pruning(self.adapted.base_model))

    @property
    def _config(self) -> AdaLoraConfig:
        return self.adapted.peft_config[ADAPTER]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Return the task's loss alone: PEFT would add its price to every batch's."""
        with _replaced(self._config, orth_reg_weight=0.0):
            return super().compute_loss(*args, **kwargs)

    def take_adapter(self, checkpoint: Path) -> None:
        """Give the model the adapter of a checkpoint, and say which of its ranks are left."""
        with resized(self.adapted):
            super().take_adapter(checkpoint)
        self._restore(checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self._get_output_dir(None))
        with resized(self.adapted):
            super()._save(str(folder), state_dict)
        allocator = self.adapted.base_model.rankallocator
        kept = {
            f"kept.{name}": torch.tensor(mask) for name, mask in (self._config.rank_pattern or {}).items()
        }
        averages = {
            f"{kind}.{name}": value.contiguous()
            for kind in _AVERAGES
            for name, value in getattr(allocator, kind).items()
        }
        save_file({**kept, **averages}, folder / ALLOCATION_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with resized(self.adapted):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._restore(Path(resume_from_checkpoint))

    def _restore(self, checkpoint: Path) -> None:
        allocator = self.adapted.base_model.rankallocator
        stored = load_file(checkpoint / ALLOCATION_FILE, device=str(self.args.device))
        for kind in _AVERAGES:
            setattr(allocator, kind, _under(kind, stored))
        allocator.ipt = {name: torch.zeros_like(value) for name, value in allocator.exp_avg_ipt.items()}
        kept = {name: mask.tolist() for name, mask in _under("kept", stored).items()}
        self._config.rank_pattern = kept or None


def take_ranks(model: PeftModel, pattern: Mapping[str, Sequence[bool]]) -> None:
    """Give a new AdaLoRA adapter the ranks that another one was left with; its scaling stays that of its first rank.

    Args:
        model: has the adapter, unpruned.
        pattern: as PEFT saves it: name of a `lora_E` → which of its ranks are left.
    """
    ranks = {name.partition(".lora_E")[0]: sum(kept) for name, kept in pattern.items()}
    inner: Any = model.base_model.model
    for name, module in inner.named_modules():
        if name in ranks:
            module.r[ADAPTER] = ranks[name]
            for factors in (module.lora_A, module.lora_E):
                factors[ADAPTER] = nn.Parameter(factors[ADAPTER].data[: ranks[name]].clone())
            module.lora_B[ADAPTER] = nn.Parameter(module.lora_B[ADAPTER].data[:, : ranks[name]].clone())
    config: Any = model.peft_config[ADAPTER]
    config.rank_pattern = dict(pattern)


@contextlib.contextmanager
def resized(model: PeftModel) -> Iterator[None]:
    """Have PEFT take an adapter's tensors in the shapes that the model has: it would prune it once more."""
    config = model.peft_config[ADAPTER]
    with (
        _replaced(config, rank_pattern=None)
        if isinstance(config, AdaLoraConfig)
        else contextlib.nullcontext()
    ):
        yield


class _Pruning(TrainerCallback):
    """Let PEFT weigh and prune the ranks between an optimizer's step and the clearing of its gradients."""

    def __init__(self, tuner: Any) -> None:
        self._tuner = tuner

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._tuner.update_and_allocate(state.global_step)


def _layers(model: nn.Module) -> Iterator[Any]:
    return (m for m in model.modules() if isinstance(m, AdaLoraLayer) and ADAPTER in m.lora_A)


def _under(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(kind) + 1 :]: value for name, value in tensors.items() if name.startswith(f"{kind}.")}


@contextlib.contextmanager
def _replaced(config: Any, **values: Any) -> Iterator[None]:
    """Have other values in a configuration for a while."""
    before = {name: getattr(config, name) for name in values}
    try:
        for name, value in values.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
