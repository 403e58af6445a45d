"""What is wrong with the adapter that a training is to carry on from, as far as its folder tells without a weight."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from hiplora.recipes.methods import OF_THE_GAINS, OF_THE_SPLIT, Method

# What may differ between an adapter and the training that carries on from it: how it is trained, not what it is.
FREE = ("preset", "lora_dropout", "orth_reg_weight", *OF_THE_GAINS, *OF_THE_SPLIT)
_FILES = {
    "adapter_config.json": "its training is not finished, or it is no adapter",
    "adapter_model.safetensors": "it was not saved completely",
    "recipe.yaml": "`hiplora train` did not make it",
}
_METHOD: TypeAdapter[Any] = TypeAdapter(Method)


def start_problems(method: Any, start_from: str) -> list[str]:
    """Say why a training with `method` cannot carry on from the adapter in the folder `start_from`.

    The adapter must be the finished result of a training with the same method and settings; those that only steer
    the training (dropout, the price of the gains, Split-LoRA's clients) may differ.
    """
    folder = Path(start_from)
    if not folder.is_dir():
        return [f"no such folder: {folder}; name the output folder of a finished `hiplora train`"]
    for name, meaning in _FILES.items():
        if not (folder / name).is_file():
            return [
                f"{folder} has no {name}: {meaning}; name the output folder of a finished `hiplora train`"
            ]
    try:
        stored = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        there = _METHOD.validate_python(stored["method"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError, ValidationError):
        return [f"{folder}/recipe.yaml is no recipe of this version's; train the adapter again"]
    if changes := _changes(there, method):
        return [
            f"{folder} holds another adapter ({'; '.join(changes)}); give the recipe the adapter's own method and "
            "settings, or name another folder"
        ]
    return []


def _changes(there: Any, here: Any) -> list[str]:
    if there.name != here.name:
        return [f"method {there.name} there, {here.name} here"]
    old, new = _kept(there), _kept(here)
    return [f"method.{name}: {old[name]} there, {new[name]} here" for name in old if old[name] != new[name]]


def _kept(method: Any) -> dict[str, Any]:
    """Return the settings that make an adapter what it is; of a text only its name, since it may be elsewhere."""
    values = method.model_dump(mode="json", exclude={*FREE})
    if values.get("calibration_text") is not None:
        values["calibration_text"] = Path(values["calibration_text"]).name
    if isinstance(values["target_modules"], list):
        values["target_modules"] = sorted(values["target_modules"])
    return values
