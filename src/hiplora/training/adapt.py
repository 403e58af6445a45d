"""Put a method's adapter on a model, new or carried on from a finished one, and save it when it is trained."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from hiplora.errors import ConfigError, HipLoraError, first_line
from hiplora.files import parse_yaml
from hiplora.training.baselines import AnyMethod
from hiplora.training.baselines.lora import keep_start, restored, split_difference, to_difference
from hiplora.training.fit import fitting_config
from hiplora.training.method import ADAPTER, BASIS_FILE, CONFIG_FILE, WEIGHTS_FILE, Method, save_adapter
from hiplora.training.recipe import TrainRecipe

if TYPE_CHECKING:
    from peft import PeftModel


def put_on(
    method: Any,
    model: Any,
    tokenizer: Any,
    *,
    seed: int,
    start: Path | None = None,
    steps: int | None = None,
    given: Path | None = None,
) -> "PeftModel":
    """Put a method's adapter on a bare model, which is changed: calibrated, at the point where training begins.

    The folder `start` keeps the start of a method that moves the base: read if it has one, else written. `given` is the
    folder of a finished adapter to carry on from (`start_problem`), instead of a new one. Raises ConfigError if the
    method or the given adapter does not fit the model, AdapterError if that is damaged, and what `prepare` does.
    """
    import torch
    from peft import get_peft_model, get_peft_model_state_dict
    from safetensors.torch import load_file

    from hiplora.adapters import quiet_loading

    kept = start / WEIGHTS_FILE if method.moves_base and start is not None else None
    tensors, begin = load_file(given / WEIGHTS_FILE) if given is not None else None, None
    if tensors is not None and kept is not None:
        tensors, origin = split_difference(tensors)
        if not kept.is_file():
            keep_start(origin, kept)
    stored = None if given is None else json.loads((given / CONFIG_FILE).read_text(encoding="utf-8"))
    config = fitting_config(method, model, steps, stored)
    try:
        if kept is not None and kept.is_file():
            begin = restored(config, kept)
        elif given is None:
            begin = method.prepare(config, model, tokenizer)
        torch.manual_seed(seed)
        with quiet_loading():
            adapted: Any = get_peft_model(model, config)
        if begin is not None:
            begin(adapted)
    except ValueError as error:
        if isinstance(error, HipLoraError) and not isinstance(error, ConfigError):
            raise
        dropout = "lora_dropout" in str(error)  # which PEFT's LoRA does not have on experts
        way = "set method.lora_dropout to 0" if dropout else "check method.target_modules and the patterns"
        raise ConfigError(f"method {method.name} does not fit the model: {error}; {way}") from error
    if not adapted.get_nb_trainable_parameters()[0]:
        raise ConfigError(
            f"method {method.name} leaves no parameter to train; check its ranks and method.target_modules"
        )
    if kept is not None and not kept.is_file():
        keep_start(get_peft_model_state_dict(adapted, adapter_name=ADAPTER, save_embedding_layers=False), kept)
    if tensors is not None:
        _load_tensors(adapted, tensors, given)
    return adapted


def _load_tensors(model: Any, tensors: dict[str, Any], folder: Path | None) -> None:
    """Give the model's adapter the tensors of another, from a folder."""
    from peft import set_peft_model_state_dict

    try:
        loaded: Any = set_peft_model_state_dict(model, tensors, ADAPTER)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        if unfit := sorted((trained & {*loaded.missing_keys}) | {*loaded.unexpected_keys}):
            raise RuntimeError(f"{unfit[0]} is on one side only")
    except RuntimeError as error:
        way = "it was trained on another one, or on other modules of it"
        raise ConfigError(
            f"train.start_from: {folder} does not fit this model ({first_line(error)}); {way}"
        ) from error


def save_trained(method: Method, model: "PeftModel", folder: Path, start: Path | None = None) -> None:
    """Save a trained adapter for the untouched base model; `start` as in `put_on`."""
    save_adapter(model, folder)
    if method.moves_base:
        assert start is not None, "a method that moves the base is saved relative to its start"
        to_difference(folder, start)


def start_problem(recipe: TrainRecipe) -> str | None:
    """Say why a training cannot carry on from the adapter in the folder `train.start_from`, if it names one.

    It must be the finished result of a training with the same method and settings, but for `Method.steering`.
    """
    if recipe.train.start_from is None:
        return None
    folder, method = Path(recipe.train.start_from), recipe.method
    for name in (CONFIG_FILE, WEIGHTS_FILE, "recipe.yaml"):
        if not (folder / name).is_file():
            return f"train.start_from: {folder} has no {name}; name the output folder of a finished `hiplora train`"
    try:
        stored = parse_yaml((folder / "recipe.yaml").read_text(encoding="utf-8"))
        given = TypeAdapter(AnyMethod).validate_python(stored["method"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"train.start_from: {folder}/recipe.yaml is not a recipe of this version; train the adapter again"
    old, new = _identity(given), _identity(method)
    changes = [f"method.{key}: {old.get(key)} there, {new[key]} here" for key in new if old.get(key) != new[key]]
    if given.name != method.name:
        changes = [f"method {given.name} there, {method.name} here"]
    if changes:
        way = "give the recipe the adapter's own method and settings, or name another folder"
        return f"train.start_from: {folder} holds another adapter ({'; '.join(changes)}); {way}"
    if not recipe.widens and (folder / BASIS_FILE).is_file():
        way = "its parts have a basis each, so they cannot be trained on as one; remove `widen: false`"
        return f"train.widen: {folder} was widened before, and {way}"
    return None


def _identity(method: Method) -> dict[str, Any]:
    """Return the settings that make an adapter what it is; of a text only its name, since it may have moved."""
    values = method.model_dump(mode="json", exclude={*method.steering})
    if values.get("calibration_text") is not None:
        values["calibration_text"] = Path(values["calibration_text"]).name
    if isinstance(values["target_modules"], list):
        values["target_modules"] = sorted(values["target_modules"])
    return values
