"""Which weights of a model would an adapter be put on? Found by the tuner's own rules, changing nothing."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from hiplora.errors import ConfigError, HipLoraError
from hiplora.spectral import RankSpec
from hiplora.tuner.config import HipLoraConfig
from hiplora.tuner.model import HipLoraModel, as_layer, for_module


@dataclass(frozen=True)
class Target:
    """A weight to be factored: its module, shape (m, n), principal rank as it was asked for, and whether it lies there
    as (n, m)."""

    name: str
    shape: tuple[int, int]
    k: RankSpec
    transposed: bool

    @property
    def kind(self) -> str:
        """The module's own name, the same in every layer: `q_proj`."""
        return self.name.rpartition(".")[2]


def survey(model: nn.Module, config: HipLoraConfig) -> list[Target]:
    """Return the weights that an adapter of this configuration would sit on, in the model's order.

    Raises:
        ConfigError: no module matches, or one that does is not a linear layer.
    """
    # PEFT would add this configuration to those of the adapters that the model has.
    others = vars(model).pop("peft_config", None)
    try:
        _Survey(model, {"default": copy.deepcopy(config)}, "default")
    except _AllFound as found:
        return found.targets
    except HipLoraError:
        raise
    except (ValueError, re.error) as error:  # PEFT's own, for targets that match nothing or do not compile
        raise ConfigError(f"target_modules {config.target_modules!r}: {error}") from error
    finally:
        if others is not None:
            vars(model)["peft_config"] = others
    raise AssertionError("PEFT finished an injection without activating the adapter")


class _AllFound(Exception):
    """Every module was visited: the way out before PEFT touches the model."""

    def __init__(self, targets: list[Target]):
        super().__init__()
        self.targets = targets


class _Survey(HipLoraModel):
    """The tuner itself, so that every module is chosen by the very same rules; it notes and replaces nothing."""

    def __init__(self, model: nn.Module, *args: Any):
        self.targets: list[Target] = []
        super().__init__(model, *args)

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        BaseTuner.inject_adapter(self, *args, **kwargs)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = as_layer(target, current_key)
        m, n = layer.out_features, layer.in_features
        k = for_module(peft_config.principal_rank_pattern, current_key, peft_config.principal_rank)
        self.targets.append(Target(current_key, (m, n), k, layer.transposed))

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise _AllFound(self.targets)
