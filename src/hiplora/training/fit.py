"""Whether a recipe's method fits a model, read off its modules' names and shapes, and its trackers are installed."""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hiplora.errors import ConfigError
from hiplora.training.method import Method
from hiplora.training.recipe import TrainRecipe

if TYPE_CHECKING:
    from peft import PeftConfig


def check_fit(recipe: TrainRecipe) -> Any:
    """Check that a recipe's method fits its model, as `fitting_config`; return the model without weights."""
    from hiplora.models import skeleton

    bare = skeleton(recipe.model)
    fitting_config(recipe.method, bare, steps=10**9)  # the rows are not counted yet
    return bare


def fitting_config(
    method: Any, model: Any, steps: int | None = None, given: Mapping[str, Any] | None = None
) -> "PeftConfig":
    """Return the PEFT configuration of a method's adapter on a model, which may be without weights.

    `given` is the configuration of a finished adapter to carry on. Raises ConfigError if a name or pattern matches
    nothing, a layer has fewer directions than are asked of it, or the layer would not be trained.
    """
    from hiplora.tuner import HipLoraConfig, default_targets, find_targets, matching_names
    from hiplora.tuner.experts import unrolled

    config: Any = method.peft_config(steps) if given is None else method.continued_config(given)
    if method.target_modules == Method.model_fields["target_modules"].default:  # whatever this model calls them
        config.target_modules = {*default_targets(model, "paper")}
    targets: Any = ()
    try:
        targets = find_targets(model, config)
    except ConfigError as error:
        with unrolled(model):  # other methods of PEFT adapt embeddings too
            if isinstance(config, HipLoraConfig) or not matching_names(model, config):
                way = "check method.target_modules and the patterns"
                raise ConfigError(f"method {method.name} does not fit the model: {error}; {way}") from error
    for target in targets:
        method.check_layer(config, target)
    modules, head = dict(model.named_modules()), model.get_output_embeddings()
    if wrong := next((target.name for target in targets if modules.get(target.name) is head is not None), None):
        way = "leave it out, or name it in modules_to_save"
        raise ConfigError(f"layer {wrong}: the training reads the output head's weight and never calls it; {way}")
    if unmatched := [*_unmatched(config, model, [*modules], [target.name for target in targets])]:
        raise ConfigError(f"{unmatched[0]} of {type(model).__name__}; correct or remove it")
    return config


def _unmatched(config: Any, model: Any, modules: Iterable[str], adapted: list[str]) -> Iterator[str]:
    """Say which names and patterns of a configuration match nothing."""
    from hiplora.tuner import matching_names
    from hiplora.tuner.experts import unrolled

    free = {"exclude_modules": None, "modules_to_save": None, "layers_to_transform": None, "layers_pattern": None}
    with unrolled(model):
        for field in ("target_modules", "exclude_modules"):
            value = getattr(config, field, None) or ()
            for name in [value] if isinstance(value, str) else sorted(value):
                alone = copy.copy(config)
                vars(alone).update(free, target_modules=value if isinstance(value, str) else {name})
                if not matching_names(model, alone):
                    yield f"{field} {name!r} matches no module"
    for name in getattr(config, "modules_to_save", None) or ():
        if not any(module.endswith(name) for module in modules):
            yield f"modules_to_save {name!r} matches no module"
    if not adapted:  # embeddings alone
        return
    layers = getattr(config, "layers_to_transform", None)
    for index in [layers] if isinstance(layers, int) else layers or ():
        if not any(str(index) in name.split(".") for name in adapted):
            yield f"layers_to_transform {index} matches no adapted layer"
    whole = r"{}" if hasattr(config, "effective_rank") else r"^(.*\.)?({})$"  # PEFT's OSF searches
    for field in ("rank_pattern", "alpha_pattern", "principal_rank_pattern"):
        for pattern in getattr(config, field, None) or ():
            if not any(re.search(whole.format(pattern), name) for name in adapted):
                yield f"{field} {pattern!r} matches no adapted layer"


def check_trackers(given: str | list[str]) -> None:
    """Check that the Trainer knows the trackers of `report_to`, and that they are installed."""
    from transformers.integrations import integration_utils

    known, found = integration_utils.INTEGRATION_TO_CALLBACK, integration_utils.get_available_reporting_integrations()
    for name in [] if given in ("none", "all", ["none"], ["all"]) else [given] if isinstance(given, str) else given:
        if name not in known:
            raise ConfigError(
                f"train.report_to: {name!r} is no tracker; expected none, all or some of {', '.join(known)}"
            )
        if name not in (*found, "azure_ml", "flyte"):  # of these two the list says less
            raise ConfigError(f"train.report_to: {name} is not installed; install its package, or remove it")
