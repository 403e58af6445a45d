"""Carrying on from a finished adapter: its weights, and of HiP-LoRA its factors, trained further on new data."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import TypeAdapter

from hiplora.errors import ConfigError, first_line
from hiplora.training.method import ADAPTER, CONFIG_FILE, WEIGHTS_FILE, Method
from hiplora.training.methods import AnyMethod

if TYPE_CHECKING:
    from peft import PeftModel


def start_problem(method: Method, start_from: str) -> str | None:
    """Say why a training with `method` cannot carry on from the adapter in the folder `start_from`.

    The adapter must be the finished result of a training with the same method and settings; those that only steer the
    training (`Method.steering`) may differ.
    """
    folder = Path(start_from)
    for name in (CONFIG_FILE, WEIGHTS_FILE, "recipe.yaml"):
        if not (folder / name).is_file():
            return f"{folder} has no {name}; name the output folder of a finished `hiplora train`"
    try:
        stored = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        given = TypeAdapter(AnyMethod).validate_python(stored["method"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return f"{folder}/recipe.yaml is not a recipe of this version; train the adapter again"
    old, new = _identity(given), _identity(method)
    changes = [f"method.{key}: {old.get(key)} there, {new[key]} here" for key in new if old.get(key) != new[key]]
    if given.name != method.name:  # type: ignore[attr-defined]
        changes = [f"method {given.name} there, {method.name} here"]  # type: ignore[attr-defined]
    if not changes:
        return None
    return (
        f"{folder} holds another adapter ({'; '.join(changes)}); give the recipe the adapter's own method and "
        "settings, or name another folder"
    )


def _identity(method: Method) -> dict[str, Any]:
    """Return the settings that make an adapter what it is; of a text only its name, since it may have moved."""
    values = method.model_dump(mode="json", exclude={*method.steering})
    if values.get("calibration_text") is not None:
        values["calibration_text"] = Path(values["calibration_text"]).name
    if isinstance(values["target_modules"], list):
        values["target_modules"] = sorted(values["target_modules"])
    return values


def adapter_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of a saved adapter."""
    return json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))


def load_start(method: Method, model: "PeftModel", folder: Path) -> None:
    """Give the model's adapter the weights of the adapter in a folder.

    Raises:
        ConfigError: they do not fit the model; names the first tensor that does not.
        AdapterError: a HiP-LoRA adapter is damaged.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    try:
        tensors = method.trained_tensors(load_file(folder / WEIGHTS_FILE))
        loaded: Any = set_peft_model_state_dict(model, tensors, ADAPTER)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        if unfit := sorted((trained & {*loaded.missing_keys}) | {*loaded.unexpected_keys}):
            raise RuntimeError(f"{unfit[0]} is on one side only")
    except RuntimeError as error:
        raise ConfigError(
            f"train.start_from: {folder} does not fit this model ({first_line(error)}); it was trained on another one, "
            "or on other modules of it"
        ) from error
