"""From a recipe's method to a PEFT configuration; an adapter in a folder."""

import warnings
from pathlib import Path
from typing import Any

from peft import AdaLoraConfig, LoraConfig, OSFConfig, PeftConfig, PeftModel

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
from hiplora.tuner import HipLoraConfig

ADAPTER = "default"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
STARTS_OF_PEFT: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "corda": {"init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}},
}


def adapter_config(method: Targeted, schedule: Schedule | None = None) -> PeftConfig:
    """Make the PEFT configuration of a recipe's method; every setting of the method is passed on.

    `schedule` is AdaLoRA's. A method that moves the base needs `moved_starts.prepare_start` too.

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
    start = STARTS_OF_PEFT.get(getattr(method, "name", ""), {})
    return LoraConfig(task_type="CAUSAL_LM", **start, **settings)


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


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Save an adapter's own tensors and its configuration; the embeddings of the base are no part of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Adapter .* have invalid shape"
        )  # AdaLoRA's modules without any rank
        model.save_pretrained(str(folder), save_embedding_layers=False)
