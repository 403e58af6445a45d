"""Check that a method fits a model, put its adapter on, new or carried on, and save it when it is trained."""

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from hiplora.errors import ConfigError, HipLoraError, first_line
from hiplora.files import parse_yaml
from hiplora.training.baselines import AnyMethod
from hiplora.training.baselines.lora import keep_start, restored, split_difference, to_difference
from hiplora.training.method import ADAPTER, BASIS_FILE, CONFIG_FILE, WEIGHTS_FILE, Method, save_adapter
from hiplora.training.recipe import TrainRecipe

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


def check_fit(recipe: TrainRecipe) -> Any:
    """Check that a recipe's method fits its model, as `fitting_config`; return the model without weights."""
    from hiplora.models import skeleton

    bare = skeleton(recipe.model)
    fitting_config(recipe.method, bare, steps=10**9)  # the rows are not counted yet
    return bare


def fitting_config(
    method: Any, model: Any, steps: int | None = None, stored: Mapping[str, Any] | None = None
) -> "PeftConfig":
    """Return the PEFT configuration of a method's adapter on a model, which may be without weights.

    `stored` is the configuration of a finished adapter to carry on. Raises ConfigError if a name or pattern matches
    nothing, a layer has fewer directions than the ranks need, or the layer would not be trained.
    """
    from hiplora.tuner import HipLoraConfig, default_targets, find_targets, matching_names
    from hiplora.tuner.experts import unrolled
    from hiplora.tuner.targets import short_names

    config: Any = method.peft_config(steps) if stored is None else method.continued_config(stored)
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
    modules, head = dict(model.named_modules()), model.get_output_embeddings()
    if config.target_modules == "all-linear" and not isinstance(config, HipLoraConfig):
        with unrolled(model):
            uncalled = {*matching_names(model, config)} - {target.name for target in targets}
        if uncalled:  # PEFT refuses what Mamba's kernels read without a call
            config.target_modules = {*short_names(model, [t.name for t in targets if t.name in modules])}
    for target in targets:
        method.check_layer(config, target)
    for target in targets:
        if head is not None and modules.get(target.name) is head:
            what = f"layer {target.name}: the training reads the output head's weight and never calls it"
            raise ConfigError(f"{what}; leave it out, or name it in modules_to_save")
    if unmatched := [*_unmatched(config, model, [*modules], [target.name for target in targets])]:
        raise ConfigError(f"{unmatched[0]} of {type(model).__name__}; correct or remove it")
    return config


def _unmatched(config: Any, model: Any, modules: Iterable[str], adapted: list[str]) -> Iterator[str]:
    """Yield a message for each name and pattern of a configuration that matches nothing."""
    from hiplora.tuner import matching_names
    from hiplora.tuner.experts import unrolled

    unrestricted = dict.fromkeys(("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"))
    with unrolled(model):
        for field in ("target_modules", "exclude_modules"):
            value = getattr(config, field, None) or ()
            for name in [value] if isinstance(value, str) else sorted(value):
                single = copy.copy(config)
                vars(single).update(unrestricted, target_modules=value if isinstance(value, str) else {name})
                if not matching_names(model, single):
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
    match = r"{}" if hasattr(config, "effective_rank") else r"^(.*\.)?({})$"  # PEFT's OSF searches
    for field in ("rank_pattern", "alpha_pattern", "principal_rank_pattern"):
        for pattern in getattr(config, field, None) or ():
            if not any(re.search(match.format(pattern), name) for name in adapted):
                yield f"{field} {pattern!r} matches no adapted layer"


def check_trackers(trackers: str | list[str]) -> None:
    """Check that the Trainer knows the trackers of `report_to`, and that they are installed."""
    from transformers.integrations import integration_utils

    known = integration_utils.INTEGRATION_TO_CALLBACK
    installed = (*integration_utils.get_available_reporting_integrations(), "azure_ml", "flyte")  # it omits these two
    names = [trackers] if isinstance(trackers, str) else trackers
    for name in names if names not in (["none"], ["all"]) else ():
        if name not in known:
            raise ConfigError(
                f"train.report_to: {name!r} is no tracker; expected none, all or some of {', '.join(known)}"
            )
        if name not in installed:
            raise ConfigError(f"train.report_to: {name} is not installed; install its package, or remove it")


def put_on(
    method: Any,
    model: Any,
    tokenizer: Any,
    *,
    seed: int,
    start: Path | None = None,
    steps: int | None = None,
    start_from: Path | None = None,
) -> "PeftModel":
    """Put a method's adapter on a bare model, which is changed: calibrated, at the point where training begins.

    The folder `start` keeps the start of a method that moves the base: read if it has one, else written. `start_from`
    is the folder of a finished adapter to carry on from (`start_problem`), instead of a new one. Raises ConfigError if
    the method or that adapter does not fit the model, AdapterError if the adapter is damaged, and what `prepare`
    raises.
    """
    import torch
    from peft import get_peft_model, get_peft_model_state_dict
    from safetensors.torch import load_file

    from hiplora.adapters import quiet_loading

    start_file = start / WEIGHTS_FILE if method.moves_base and start is not None else None
    tensors, begin = load_file(start_from / WEIGHTS_FILE) if start_from is not None else None, None
    if tensors is not None and start_file is not None:
        tensors, origin = split_difference(tensors)
        if not start_file.is_file():
            keep_start(origin, start_file)
    stored = None if start_from is None else json.loads((start_from / CONFIG_FILE).read_text(encoding="utf-8"))
    config = fitting_config(method, model, steps, stored)
    try:
        if start_file is not None and start_file.is_file():
            begin = restored(config, start_file)
        elif start_from is None:
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
    if start_file is not None and not start_file.is_file():
        keep_start(get_peft_model_state_dict(adapted, adapter_name=ADAPTER, save_embedding_layers=False), start_file)
    if tensors is not None:
        _load_tensors(adapted, tensors, start_from)
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
    """Return why a training cannot carry on from the adapter in the folder `train.start_from`; None if it can.

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
        stored_method = TypeAdapter(AnyMethod).validate_python(stored["method"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"train.start_from: {folder}/recipe.yaml is not a recipe of this version; train the adapter again"
    old, new = _identity(stored_method), _identity(method)
    changes = [f"method.{key}: {old.get(key)} there, {new[key]} here" for key in new if old.get(key) != new[key]]
    if stored_method.name != method.name:
        changes = [f"method {stored_method.name} there, {method.name} here"]
    if changes:
        way = "give the recipe the adapter's own method and settings, or name another folder"
        return f"train.start_from: {folder} holds another adapter ({'; '.join(changes)}); {way}"
    if not recipe.widens and (folder / BASIS_FILE).is_file():
        way = "its parts have a basis each, so they cannot be trained on as one; remove `widen: false`"
        return f"train.widen: {folder} was widened before, and {way}"
    return None


def _identity(method: Method) -> dict[str, Any]:
    """Return the settings that define an adapter; of a text only its name, since the file may have moved."""
    values = method.model_dump(mode="json", exclude={*method.steering})
    if values.get("calibration_text") is not None:
        values["calibration_text"] = Path(values["calibration_text"]).name
    if isinstance(values["target_modules"], list):
        values["target_modules"] = sorted(values["target_modules"])
    return values
