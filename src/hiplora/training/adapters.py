"""From a recipe's method to a PEFT configuration, and what PiSSA needs beside it.

PiSSA takes the principal part out of the base weights and trains it. So that its adapter loads on the untouched
base, the start is kept, and the difference to it is saved: a plain LoRA of rank 2r.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from peft import AdaLoraConfig, LoraConfig, OSFConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor

from hiplora.errors import ConfigError
from hiplora.recipes.adalora import Schedule
from hiplora.recipes.methods import (
    OF_THE_SPLIT,
    AdaLoraMethod,
    HipLoraMethod,
    OsfMethod,
    ProjLoraMethod,
    Targeted,
)
from hiplora.training.checkpoints import staged
from hiplora.tuner import HipLoraConfig

ADAPTER = "default"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def adapter_config(method: Targeted, schedule: Schedule | None = None) -> PeftConfig:
    """Make the PEFT configuration of a recipe's method; every setting of the method is passed on.

    `schedule` is AdaLoRA's.

    Raises:
        ConfigError: AdaLoRA has no schedule: whoever trains does not prune.
    """
    if isinstance(method, AdaLoraMethod):
        return _adalora_config(method, schedule)
    if isinstance(method, OsfMethod):
        return OSFConfig(task_type="CAUSAL_LM", **method.model_dump(exclude={"name"}))
    settings = method.model_dump(
        exclude={"name", "preset", "calibration_text", "calibration_tokens", *OF_THE_SPLIT}
    )
    if isinstance(method, HipLoraMethod):
        return HipLoraConfig(task_type="CAUSAL_LM", **settings)
    if isinstance(method, ProjLoraMethod):
        return HipLoraConfig(task_type="CAUSAL_LM", principal_channel=False, **settings)
    return LoraConfig(
        task_type="CAUSAL_LM", init_lora_weights="pissa" if is_pissa(method) else True, **settings
    )


def _adalora_config(method: AdaLoraMethod, schedule: Schedule | None) -> AdaLoraConfig:
    if schedule is None:
        raise ConfigError(
            "method adalora prunes its ranks while it trains, which only `hiplora train` does; use lora here"
        )
    own = ("name", "r", "init_r", "rank_pattern", "alpha_pattern", *vars(schedule))
    return AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=method.first_rank,
        target_r=method.r,
        **vars(schedule),
        **method.model_dump(exclude={*own}),
    )


def is_pissa(method: Targeted) -> bool:
    """Whether a method changes the base weights at its start."""
    return getattr(method, "name", "") == "pissa"


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Save an adapter's own tensors and its configuration; the embeddings of the base are no part of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Adapter .* have invalid shape"
        )  # AdaLoRA's modules without any rank
        model.save_pretrained(str(folder), save_embedding_layers=False)


def save_start(model: PeftModel, folder: Path) -> None:
    """Keep PiSSA's start, from which the difference is taken at the end."""
    with staged(folder) as aside:
        save_adapter(model, aside)


def save_difference(model: PeftModel, folder: Path, start: Path) -> None:
    """Save a PiSSA adapter as the plain LoRA of rank 2r that brings the untouched base to the trained model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "PiSSA changes the base weights")  # that is what is undone here
        model.save_pretrained(
            str(folder), save_embedding_layers=False, path_initial_model_for_weight_conversion=str(start)
        )


def restore_start(model: PeftModel, start: Path) -> bool:
    """Make sure that a resumed PiSSA run has the start of the run that it carries on; return whether it had.

    PEFT decomposes the weights again. On the same machine that gives the same bits; where it does not (another
    processor, another number of threads), the base weights are corrected by the difference, exact to rounding.
    """
    return take_start(model, load_file(start / WEIGHTS_FILE))


def take_start(model: PeftModel, stored: Mapping[str, Tensor]) -> bool:
    """Make sure that a model is at this very PiSSA start, its base weights too; return whether it was there."""
    again = peft.get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    if stored.keys() == again.keys() and all(torch.equal(stored[name], again[name].cpu()) for name in stored):
        return True
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer) and ADAPTER in layer.lora_A]
    taken_out = [_update(layer) for layer in layers]
    peft.set_peft_model_state_dict(model, dict(stored), ADAPTER)
    for layer, other in zip(layers, taken_out, strict=True):
        base: Any = layer.get_base_layer()
        base.weight.data = (base.weight.float() + other - _update(layer)).to(base.weight.dtype)
    return False


@torch.no_grad()
def _update(layer: Any) -> Tensor:
    """The dense update of a LoRA layer, in fp32 and in the layout of its base weight."""
    return layer.get_delta_weight(ADAPTER).float()
