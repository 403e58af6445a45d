"""Carrying on from an adapter: its weights, and of HiP-LoRA its factors, on a new training's data.

The result is one adapter on the untouched base. That of a method that moves the base (PiSSA and the like) is saved as
a plain LoRA of rank 2r, the trained factors beside those of its start; the trained ones are taken up, and the start is
the given one's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import peft
import yaml
from peft import AdaLoraConfig, PeftConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hiplora.errors import ConfigError
from hiplora.provenance import file_sha256
from hiplora.recipes import TrainRecipe
from hiplora.recipes.adalora import Schedule
from hiplora.recipes.methods import AdaLoraMethod, Targeted
from hiplora.recipes.start import start_problems
from hiplora.training.adalora import resized, take_ranks
from hiplora.training.adapters import ADAPTER, CONFIG_FILE, WEIGHTS_FILE, adapter_config
from hiplora.training.moved import split_difference
from hiplora.training.run import RECIPE_FILE
from hiplora.tuner import HipLoraConfig

_OF_THE_FACTORS = ("fingerprints", "principal_ranks", "base_precision", "calibration")


@dataclass(frozen=True)
class Start:
    """The adapter that a training carries on from: its folder and the hash of its weights."""

    folder: Path
    sha256: str
    base: str  # the model that it was trained on, as its recipe names it
    differs: bool  # of a method that moves the base: saved as a difference

    def warning(self, model: str) -> str | None:
        """Say so where the adapter's base has another name than the model at hand; names prove nothing either way."""
        there, here = Path(self.base).name, Path(model).name
        return (
            None
            if there == here
            else f"train.start_from was trained on {there}, and this model is called {here}"
        )

    def record(self) -> dict[str, str]:
        """Return what the provenance keeps of it."""
        return {"folder": self.folder.name, "sha256": self.sha256}

    @property
    def config(self) -> dict[str, Any]:
        """The adapter's own configuration."""
        return json.loads((self.folder / CONFIG_FILE).read_text(encoding="utf-8"))

    def configured(self, method: Targeted) -> PeftConfig:
        """Return the configuration of the training's adapter: HiP-LoRA's with the given factors to come.

        AdaLoRA's keeps the schedule by which the given adapter was pruned, since nothing is pruned any more.
        """
        given = self.config
        if isinstance(method, AdaLoraMethod):
            return adapter_config(
                method, Schedule(**{item.name: given[item.name] for item in fields(Schedule)})
            )
        config = adapter_config(method)
        if not isinstance(config, HipLoraConfig):
            return config
        return replace(config, **{name: given[name] for name in _OF_THE_FACTORS if name in given})

    def origin(self) -> dict[str, Tensor]:
        """Return the tensors of the start that the adapter of a method that moves the base was trained from."""
        return split_difference(self._tensors())[1]

    def put_on(self, model: PeftModel) -> None:
        """Give the model's adapter the weights of this one.

        Raises:
            ConfigError: it does not fit the model; the message names the first tensor that does not.
            AdapterError: a HiP-LoRA adapter is damaged.
        """
        tensors = self._tensors()
        if self.differs:
            tensors = split_difference(tensors)[0]
        pattern = (
            self.config.get("rank_pattern") if isinstance(model.peft_config[ADAPTER], AdaLoraConfig) else None
        )
        if pattern:
            take_ranks(model, pattern)
        try:
            with resized(model):
                loaded: Any = peft.set_peft_model_state_dict(model, tensors, ADAPTER)
        except RuntimeError as error:
            raise self._unfit(str(error).strip().splitlines()[-1].strip()) from error
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        for name in sorted(trained & {*loaded.missing_keys}):
            raise self._unfit(f"it has no {name}")
        for name in sorted(loaded.unexpected_keys):
            raise self._unfit(f"the model has no {name}")

    def _tensors(self) -> dict[str, Tensor]:
        try:
            return load_file(self.folder / WEIGHTS_FILE)
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"train.start_from: {self.folder / WEIGHTS_FILE} cannot be read ({error}); train it again"
            ) from error

    def _unfit(self, reason: str) -> ConfigError:
        return ConfigError(
            f"train.start_from: {self.folder} does not fit this model ({reason}); it was trained on another one, or on "
            "other modules of it"
        )


def given_start(recipe: TrainRecipe, out: Path) -> Start | None:
    """Return the adapter that a recipe carries on from, if any, once its folder is sure to hold such a one.

    Raises:
        ConfigError: there is none, it is of another method or has other settings, or the training's own folder `out`
            is or holds it.
    """
    if recipe.train.start_from is None:
        return None
    if problems := start_problems(recipe.method, recipe.train.start_from):
        raise ConfigError(f"train.start_from: {problems[0]}")
    folder = Path(recipe.train.start_from)
    base = yaml.safe_load((folder / RECIPE_FILE).read_text(encoding="utf-8")).get("model", "")
    if out.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise ConfigError(
            f"--out {out}: is where the adapter of train.start_from lies; name another folder, so that it is kept"
        )
    return Start(folder, file_sha256(folder / WEIGHTS_FILE), str(base), recipe.method.moves_base)
