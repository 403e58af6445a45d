"""Put a method's adapter on a model, and save it when it is trained."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model

from hiplora.errors import ConfigError, HipLoraError
from hiplora.training import residual_init
from hiplora.training.method import ATTENTION_PROJECTIONS, WEIGHTS_FILE, Method, save_adapter
from hiplora.tuner import default_targets


def put_on(
    method: Method,
    model: Any,
    tokenizer: Any,
    *,
    seed: int,
    start: Path | None = None,
    steps: int | None = None,
    config: PeftConfig | None = None,
) -> PeftModel:
    """Put a method's adapter on a bare model: calibrated, initialized, at the point where training begins.

    Args:
        method: the method.
        model: the bare base model; it is changed.
        tokenizer: reads the method's calibration text.
        seed: of the adapter's random factors.
        start: for a method that moves the base, the folder that keeps its start: read if it has one, else written.
        steps: of the training, where the method needs to know them (AdaLoRA).
        config: a configuration that needs no calibration, instead of the method's own.

    Raises:
        ConfigError: the method does not fit the model.
        DataError, FactorError: as `Method.prepare`.
    """
    keeps = start if method.moves_base else None
    restores = keeps is not None and (keeps / WEIGHTS_FILE).is_file()
    begin = None
    try:
        prepare = config is None
        config = config or method.peft_config(steps)
        if prepare and method.target_modules == list(ATTENTION_PROJECTIONS):  # whatever this model calls them
            config.target_modules = {*default_targets(model, "paper")}  # type: ignore[attr-defined]
        if restores:
            begin = residual_init.restored(config, keeps)  # type: ignore[arg-type]
        elif prepare:
            begin = method.prepare(config, model, tokenizer)
        torch.manual_seed(seed)
        adapted: Any = get_peft_model(model, config)
        if begin is not None:
            begin(adapted)
    except ValueError as error:
        if isinstance(error, HipLoraError) and not isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"method {method.name} does not fit the model: {error}; check method.target_modules and the patterns "  # type: ignore[attr-defined]
            "against the model's module names"
        ) from error
    if keeps is not None and not restores:
        residual_init.save_start(adapted, keeps)
    return adapted


def save_trained(method: Method, model: PeftModel, folder: Path, start: Path | None = None) -> None:
    """Save a trained adapter for the untouched base model; `start` as in `put_on`."""
    save_adapter(model, folder)
    if method.moves_base:
        assert start is not None, "a method that moves the base is saved relative to its start"
        residual_init.to_difference(folder, start)
