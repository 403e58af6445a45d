"""The shape of a model, read from its configuration alone: what an adapter, a step or a cache of it will take."""

import functools
import importlib.resources
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hiplora.errors import ConfigError, first_line
from hiplora.models import quiet_transformers
from hiplora.models.pico import CONFIG as PICO_CONFIG

FACTORED = ("hiplora", "proj_lora")  # methods that keep spectral factors
WITHOUT_GAINS = (
    *("adalora", "corda", "lora", "lora_null", "milora"),
    *("osf", "pissa", "proj_lora", "split_lora"),
)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a causal language model; parameters that are tied count once.

    `embedding_parameters` are those of the input embeddings and of an output head with a matrix of its own;
    `linear_parameters` those of the linear layers that can be adapted, biases included, the head not. `modules`
    maps every linear layer's full name to (out, in), `sizes` every module with parameters to their number; `head`
    is the output head's name, empty if there is none.

    Both methods take a recipe's method with every default filled in, as `recipe.method.model_dump()` gives it.
    """

    parameters: int
    embedding_parameters: int
    linear_parameters: int
    hidden: int
    layers: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    modules: Mapping[str, tuple[int, int]]
    sizes: Mapping[str, int]
    head: str = ""

    def trainable(self, method_settings: Mapping[str, Any]) -> int:
        """Return how many parameters a method trains.

        A layer (m, n) has r(m + n) of them, and k gains with HiP-LoRA's principal channel; AdaLoRA's has
        init_r(m + n + 1) before the pruning, OSF's (min(m, n) − effective_rank)(m + n + 1). `modules_to_save` are
        trained in full.

        Raises:
            ConfigError: a setting is missing, or no layer matches `target_modules`.
        """
        count = sum(
            _layer_parameters(method_settings, name, m, n)
            for name, (m, n) in self.targets(method_settings).items()
        )
        if _learns_gains(method_settings):
            count += sum(self.principal_ranks(method_settings).values())
        saved = tuple(method_settings.get("modules_to_save") or ())
        whole = [name for name in self.sizes if name.rpartition(".")[2] in saved or name in saved]
        return count + sum(self.sizes[name] for name in whole)

    def factor_scalars(self, method_settings: Mapping[str, Any]) -> int:
        """Return how many numbers U, σ and V have: k(m + n + 1) a layer; 0 for methods without factors.

        A principal rank by energy is counted with the most directions that it can take; raises as `trainable`.
        """
        if _setting(method_settings, "name") not in FACTORED:
            return 0
        ranks = self.principal_ranks(method_settings)
        return sum(k * (sum(self.modules[name]) + 1) for name, k in ranks.items())

    def targets(self, method_settings: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
        """Return the layers that a method adapts, chosen by PEFT's own rules: name → (out, in).

        Raises:
            ConfigError: `target_modules` is missing, or matches no linear layer.
        """
        from peft import LoraConfig
        from peft.tuners.tuners_utils import check_target_module_exists

        wanted = _setting(method_settings, "target_modules")
        if wanted == "all-linear":
            wanted = [name for name in self.modules if name != self.head]
        names = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
        others = {name: method_settings[name] for name in names if method_settings.get(name) is not None}
        config = LoraConfig(target_modules=wanted, **others)
        found = {
            name: shape for name, shape in self.modules.items() if check_target_module_exists(config, name)
        }
        if not found:
            raise ConfigError(
                f"target_modules {method_settings['target_modules']!r} matches no linear layer of the model; it has "
                f"{', '.join(sorted({name.rpartition('.')[2] for name in self.modules}))}"
            )
        return found

    def principal_ranks(self, method_settings: Mapping[str, Any]) -> dict[str, int]:
        """Return k of every layer that a method adapts; with "energy:x", the largest that it may become.

        Raises:
            ConfigError: as `targets`, or a layer has fewer directions than it is to protect.
        """
        return {
            name: _directions(
                _own(method_settings, "principal_rank_pattern", name, "principal_rank"), min(shape), name
            )
            for name, shape in self.targets(method_settings).items()
        }


@functools.lru_cache(maxsize=16)
def model_shape(name: str) -> ModelShape:
    """Return the shape of a model by name, folder or hub name; no weight is read or made.

    Raises:
        ConfigError: as `model_config`, or it is not a causal language model.
    """
    config = model_config(name)
    try:
        return shape_of(config)
    except ValueError as error:
        raise ConfigError(
            f"model {name}: is not a causal language model ({first_line(error)}); name one that generates text"
        ) from error


def model_config(name: str) -> Any:
    """Return the transformers configuration of a model by name, folder or hub name.

    A folder of that name wins; then the models whose configuration is in this package, for which neither hub nor
    cache is asked; then the hub.

    Raises:
        ConfigError: there is no such folder or hub model within reach.
    """
    from transformers import AutoConfig

    known = known_configs()
    if not Path(name).is_dir() and name in known:
        return AutoConfig.for_model(**known[name])
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model {name}: its configuration cannot be read ({first_line(error)}); expected a folder with "
            f"config.json, a hub name that this machine can reach, or, without a hub, one of {', '.join(known)}"
        ) from error


def shape_of(config: Any) -> ModelShape:
    """Return the shape of a transformers configuration, by building its causal language model on the meta device.

    Raises:
        ValueError: transformers has no causal language model for it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    modules, head = dict(_linear_layers(model)), model.get_output_embeddings()
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in model.named_modules()}
    head_name = next((name for name, module in model.named_modules() if module is head), "")
    matrices = {id(m.weight): m.weight.numel() for m in (model.get_input_embeddings(), head) if m is not None}
    heads = text.num_attention_heads
    return ModelShape(
        parameters=model.num_parameters(),
        embedding_parameters=sum(matrices.values()),
        linear_parameters=sum(sizes[name] for name in modules if name != head_name),
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        vocabulary=text.vocab_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_size=getattr(text, "head_dim", None) or text.hidden_size // heads,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        modules=modules,
        sizes={name: size for name, size in sizes.items() if name and size},
        head=head_name,
    )


@functools.cache
def known_configs() -> dict[str, dict[str, Any]]:
    """Return the configurations that come with this package: name → transformers' fields."""
    text = importlib.resources.files("hiplora.models").joinpath("shapes.yaml").read_text(encoding="utf-8")
    published = {name: entry["config"] for entry in yaml.safe_load(text) for name in entry["names"]}
    return {**published, "pico": {"model_type": "llama", **PICO_CONFIG}}


def _linear_layers(model: Any) -> Iterator[tuple[str, tuple[int, int]]]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield name, (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):  # GPT-2's linear layer, stored as (in, out)
            yield name, (module.weight.shape[1], module.weight.shape[0])


def _layer_parameters(settings: Mapping[str, Any], name: str, m: int, n: int) -> int:
    if _setting(settings, "name") == "adalora":
        return (settings.get("init_r") or math.ceil(1.5 * _setting(settings, "r"))) * (m + n + 1)
    if settings["name"] == "osf":
        return osf_rank(settings, name, min(m, n)) * (m + n + 1)
    return _own(settings, "rank_pattern", name, "r") * (m + n)


def osf_rank(settings: Mapping[str, Any], name: str, limit: int) -> int:
    """Return how many singular triplets of a layer OSF trains, of the `limit` that its weight has; as PEFT rounds."""
    kept = _setting(settings, "effective_rank")
    for pattern, own in (settings.get("rank_pattern") or {}).items():
        if re.search(pattern, name):
            kept = own
            break
    if kept is None:
        kept = limit // 2
    return limit - min(int(limit * kept) if isinstance(kept, float) else kept, limit)


def _learns_gains(settings: Mapping[str, Any]) -> bool:
    return _setting(settings, "name") not in WITHOUT_GAINS and bool(_setting(settings, "principal_channel"))


def _own(settings: Mapping[str, Any], pattern: str, module: str, default: str) -> Any:
    """Return a module's own value from a pattern of PEFT's kind, else the method's."""
    from peft.utils.other import get_pattern_key

    patterns = settings.get(pattern) or {}
    key = get_pattern_key(list(patterns), module)
    return patterns[key] if key in patterns else _setting(settings, default)


def _directions(rank: int | float | str, limit: int, name: str) -> int:
    """Return k of a layer whose smaller side is `limit`, as far as it is known before the layer is measured."""
    if isinstance(rank, str):
        return max(limit // 2, 1)
    if isinstance(rank, float):
        return min(max(round(rank * limit), 1), limit)
    if rank > limit:
        raise ConfigError(
            f"layer {name}: principal_rank {rank} exceeds min(out, in) = {limit}; lower it or "
            "set principal_rank_pattern"
        )
    return rank


def _setting(settings: Mapping[str, Any], name: str) -> Any:
    if name not in settings:
        raise ConfigError(
            f"method settings {sorted(settings)}: `{name}` is missing; pass the whole method, every default filled in, "
            "as a recipe's `method.model_dump()` gives it"
        )
    return settings[name]
