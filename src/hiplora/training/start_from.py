"""Carrying on from an adapter: its weights, and of HiP-LoRA its factors, trained further on new data."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import TypeAdapter, ValidationError

from hiplora.errors import ConfigError
from hiplora.provenance import file_sha256
from hiplora.training.method import CONFIG_FILE, WEIGHTS_FILE, Method
from hiplora.training.methods import AnyMethod

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor

    from hiplora.training.recipe import TrainRecipe

FILES = (CONFIG_FILE, WEIGHTS_FILE, "recipe.yaml")


def start_problems(method: Any, start_from: str) -> list[str]:
    """Say why a training with `method` cannot carry on from the adapter in the folder `start_from`.

    The adapter must be the finished result of a training with the same method and settings; those that only steer the
    training (`Method.steering`) may differ.
    """
    folder = Path(start_from)
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        return [f"{folder} has no {missing[0]}; name the output folder of a finished `hiplora train`"]
    try:
        stored = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        given = TypeAdapter(AnyMethod).validate_python(stored["method"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError, ValidationError):
        return [f"{folder}/recipe.yaml is not a recipe of this version; train the adapter again"]
    old, new = _identity(given), _identity(method)
    changes = [
        f"method.{name}: {old.get(name)} there, {new[name]} here"
        for name in new
        if old.get(name) != new[name]
    ]
    if given.name != method.name:
        changes = [f"method {given.name} there, {method.name} here"]
    if changes:
        return [
            f"{folder} holds another adapter ({'; '.join(changes)}); give the recipe the adapter's own method and "
            "settings, or name another folder"
        ]
    return []


def _identity(method: Any) -> dict[str, Any]:
    """Return the settings that make an adapter what it is; of a text only its name, since it may have moved."""
    values = method.model_dump(mode="json", exclude={*method.steering})
    if values.get("calibration_text") is not None:
        values["calibration_text"] = Path(values["calibration_text"]).name
    if isinstance(values["target_modules"], list):
        values["target_modules"] = sorted(values["target_modules"])
    return values


@dataclass(frozen=True)
class Start:
    """The adapter that a training carries on from."""

    folder: Path
    sha256: str
    base: str  # the model that it was trained on, as its recipe names it
    method: Method

    @classmethod
    def of(cls, recipe: "TrainRecipe", out: Path) -> "Start | None":
        """Return the adapter that a recipe carries on from, if any.

        Raises:
            ConfigError: as `start_problems`, or `out` is or contains the adapter's folder.
        """
        if recipe.train.start_from is None:
            return None
        if problems := start_problems(recipe.method, recipe.train.start_from):
            raise ConfigError(f"train.start_from: {problems[0]}")
        folder = Path(recipe.train.start_from)
        if out.resolve() in (folder.resolve(), *folder.resolve().parents):
            raise ConfigError(f"--out {out}: holds the adapter of train.start_from; name another folder")
        base = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")).get("model", "")
        return cls(folder, file_sha256(folder / WEIGHTS_FILE), str(base), recipe.method)

    @property
    def given(self) -> dict[str, Any]:
        """The adapter's own configuration."""
        return json.loads((self.folder / CONFIG_FILE).read_text(encoding="utf-8"))

    @property
    def config(self) -> "PeftConfig":
        """The configuration of the training's adapter."""
        return self.method.continued_config(self.given)

    def record(self) -> dict[str, str]:
        """Return what the provenance keeps of it."""
        return {"folder": self.folder.name, "sha256": self.sha256}

    def tensors(self) -> "dict[str, Tensor]":
        """Return the adapter's tensors.

        Raises:
            ConfigError: they cannot be read.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self.folder / WEIGHTS_FILE)
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"train.start_from: {self.folder / WEIGHTS_FILE} cannot be read ({error}); train it again"
            ) from error

    def put_on(self, model: "PeftModel") -> None:
        """Give the model's adapter the weights of this one.

        Raises:
            ConfigError: they do not fit the model; names the first tensor that does not.
            AdapterError: a HiP-LoRA adapter is damaged.
        """
        try:
            loaded = self.method.load_tensors(model, self.tensors(), self.given)
        except RuntimeError as error:
            raise self._unfit(str(error).strip().splitlines()[-1].strip()) from error
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        for name in sorted(trained & {*loaded.missing_keys}):
            raise self._unfit(f"it has no {name}")
        for name in sorted(loaded.unexpected_keys):
            raise self._unfit(f"the model has no {name}")

    def _unfit(self, reason: str) -> ConfigError:
        return ConfigError(
            f"train.start_from: {self.folder} does not fit this model ({reason}); it was trained on another one, or on "
            "other modules of it"
        )
