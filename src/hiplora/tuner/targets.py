"""Find the linear layers of a model that an adapter adapts: the preset's, by role, or those of a configuration."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _ExcludedModule,
    _get_in_out_features,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import resolve_quantization_backend
from peft.utils.other import get_pattern_key
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend, QuantizationBackend
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from hiplora.errors import AdapterError, ConfigError
from hiplora.positions import input_embeddings
from hiplora.spectral import RankSpec, resolve_rank
from hiplora.tuner.config import PATTERNS
from hiplora.tuner.experts import ALIASES, ExpertList, shared_side, unrolled
from hiplora.tuner.patterns import check_patterns

# Parts of a module's path, lower case. A projection of an MLP is a linear layer in a numbered block, outside attention,
# that lies in an MLP container or has the name of an MLP projection.
_ATTENTION = re.compile(r".*attn.*|.*attention.*|(.*_)?att")
_ATTENTION_PROJECTION = re.compile(r"[qkvo]_proj|qkv_proj|query_key_value|wqkv")
_MLP_CONTAINER = re.compile(
    r"mlp|.*_mlp|mlp_.*|ffn?s?|ffn_.*|.*feed_?forward.*|densereludense|experts?|shared_experts?"
)
_MLP_PROJECTION = re.compile(
    r"(gate|up|down|gate_up|up_gate)_proj|fc_?\d|fc_(in|out)|c_fc(_\d)?|dense_(h_to_4h|4h_to_h)|ffn|ffn_output"
    r"|w[io](_\d)?|w[123]|lin[12]|linear_?[12]"
)
# BERT and its descendants; the second pair is the Q-Former's.
_MLP_PAIRS = {(f"{part}{kind}", "dense") for part in ("intermediate", "output") for kind in ("", "_query")}
_ROUTER = re.compile(r"gate|router|.*_gate|.*router.*")
# Parts of multimodal models that text alone does not run through, where they lie inside the text decoder.
_TOWER = re.compile(r".*(vision|visual|video|audio|image|speech|qformer).*")
_ADAPTER = re.compile(r".*adapters?(_.*)?")  # a model's own, such as Zamba2's, of which a layer uses one


@dataclass(frozen=True)
class Target:
    """A linear layer to adapt: its `shape` (m, n) = (out, in), and the requested principal rank `k`."""

    name: str
    shape: tuple[int, int]
    k: RankSpec


def find_targets(model: nn.Module, config: PeftConfig) -> list[Target]:
    """Return the layers that an adapter of this configuration adapts, in the model's order.

    `config` may be of any PEFT method with `target_modules`; where it has none, they are those of its `preset`. An
    expert of a mixture is named `…experts.PARAMETER.NUMBER`. A preset and "all-linear" leave out layers as narrow as
    the principal rank, and those that Mamba's fused kernels read without a call.

    Raises:
        ConfigError: no module matches, or one that does is not a linear layer that is called.
    """
    chosen: Any = copy.copy(config)
    requested, from_checkpoint = chosen.target_modules, getattr(config, "from_checkpoint", False)
    if requested is None and not getattr(chosen, "target_parameters", None):
        chosen.target_modules = set(default_targets(model, getattr(chosen, "preset", "function-aware")))
    with unrolled(model):
        names = matching = matching_names(model, chosen)
        if from_checkpoint and matching:
            names = list(chosen.fingerprints)
            if unmatched := [name for name in names if name not in matching]:
                raise ConfigError(
                    f"the configuration is of an adapter on {unmatched[0]}, and its target_modules {requested!r} do "
                    "not name that; for other layers make a new HipLoraConfig"
                )
        if not names:
            layers = getattr(chosen, "layers_to_transform", None)
            restriction = f" in layers_to_transform {layers!r}" if layers is not None else ""
            raise ConfigError(
                f"target_modules {requested!r} match no module of {type(model).__name__}{restriction}, or all that "
                "match are excluded; name some of its linear layers"
            )
        patterns, default = getattr(chosen, "principal_rank_pattern", {}), getattr(chosen, "principal_rank", 0)
        ranks = {name: for_module(patterns, name, default) for name in names}
        targets = [linear_target(model.get_submodule(name), name, k) for name, k in ranks.items()]
    uncalled = {name for name in names if _read_by_kernels(model, name)}
    if requested in (None, "all-linear"):
        # A share of the energy is at most half of them, whatever the energies.
        broad = [t for t in targets if resolve_rank(t.k, t.shape, lambda: torch.ones(1)) < min(t.shape)]
        return [target for target in broad if target.name not in uncalled] or targets
    if uncalled and not from_checkpoint:
        raise ConfigError(
            f"layer {min(uncalled)}: Mamba's fused kernels read its weight and never call it, so that an adapter would "
            "do nothing; leave it out (in_proj is called)"
        )
    return targets


def matching_names(model: nn.Module, config: Any) -> list[str]:
    """Return the names of the modules that a configuration matches in an unrolled model; of experts, all.

    ConfigError if one of its patterns is not a regular expression, or takes too long to match.
    """
    check_patterns(vars(config), dict(model.named_modules()))
    linear, experts, all_linear = copy.copy(config), copy.copy(config), config.target_modules == "all-linear"
    if all_linear:
        _maybe_include_all_linear_layers(linear, model)
        experts.target_modules = ".*"
    elif not isinstance(config.target_modules, str):
        linear.target_modules = set(config.target_modules or ())
        experts.target_modules = {*linear.target_modules, *(getattr(config, "target_parameters", None) or ())}
    names: list[str] = []
    for name, module in _whole_modules(model).items():
        if isinstance(module, ExpertList):
            matches = [check_target_module_exists(experts, alias) for alias in _aliases(name)]
            if any(matches) and not any(isinstance(match, _ExcludedModule) for match in matches):
                names += [f"{name}.{index}" for index in range(len(module))]
        elif check_target_module_exists(linear, name) and (not all_linear or is_linear(_base(module))):
            names.append(name)
    return names


def left_out(model: nn.Module, config: Any, targets: Iterable[Target]) -> list[str]:
    """Return notes on layers that a new adapter leaves out although its configuration seems to mean them."""
    names, notes, requested = {target.name for target in targets}, [], config.target_modules
    with unrolled(model):
        modules = _base_modules(model)
        weights = {
            re.sub(r"\.base_layer|\.weight$", "", name): parameter
            for name, parameter in model.named_parameters()
            if parameter.dim() > 1 and "hiplora_" not in name
        }
        total = sum(parameter.numel() for parameter in weights.values())

        def with_share(layers: Iterable[str]) -> str:
            sizes = {name: weights[name].numel() for name in layers if name in weights}
            kinds = dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in sizes)
            return f"{', '.join(kinds)} ({sum(sizes.values()) / total:.1%} of the model's weights)"

        all_linear = requested == "all-linear"
        if all_linear and (unused := [name for name in matching_names(model, config) if name not in names]):
            layers = with_share(unused)
            notes.append(f"'all-linear' leaves out layers as narrow as principal_rank or not called: {layers}")
        experts = [name for name, module in modules.items() if isinstance(module, ExpertList)]
        matchable = [*modules, *(alias for name in experts for alias in _aliases(name))]
        listed = [*(() if isinstance(requested, str) else requested or ()), *(config.target_parameters or ())]
        unmatched = sorted(t for t in listed if not any(n == t or n.endswith(f".{t}") for n in matchable))
        if unmatched:
            notes.append(f"target_modules {unmatched} match no module of {type(model).__name__}")
        for role in _ROLES.values():
            members = {name for name, module in modules.items() if is_linear(_base(module)) and _role(name) == role}
            missed = [name for name in modules if name in members - names]
            if unmatched and missed and len(missed) < len(members):
                notes.append(f"of the {role} projections, these are left out: {with_share(missed)}")
        fused = [name for name, parameter in weights.items() if parameter.dim() == 3 and _role(name) == "MLP"]
        if fused and (all_linear or any(_role(name) == "MLP" for name in names)):
            notes.append(f"HiP-LoRA cannot adapt these 3-D parameters, which are left out: {with_share(fused)}")
    return notes


def linear_target(module: nn.Module, name: str, k: RankSpec = 0) -> Target:
    """Describe a linear layer, adapted already or not; another module is a ConfigError."""
    check_unmerged(module, name)
    base = _base(module)
    n, m = _get_in_out_features(base) if is_linear(base) else (None, None)
    if m is None or n is None:
        raise ConfigError(
            f"layer {name}: HiP-LoRA adapts linear layers, and this is a {type(base).__name__}; "
            "leave it out with exclude_modules, or train it whole with modules_to_save"
        )
    if isinstance(backend := quantization(base), ForwardOnlyQuantizationBackend):
        raise ConfigError(
            f"layer {name}: the weights of {backend.backend_name or type(base).__name__} layers cannot be read, so "
            "nothing can be kept out of their directions; load the model in bf16, or in 4 bits with bitsandbytes"
        )
    return Target(name, (m, n), k)


def check_unmerged(module: nn.Module, name: str) -> None:
    """Refuse a layer whose weight is not the base model's: an adapter is merged into it (AdapterError)."""
    if getattr(module, "merged", False):
        raise AdapterError(f"layer {name}: another adapter is merged into it; call unmerge_adapter() first")


def measured_target(module: nn.Module, name: str) -> Target:
    """Describe a layer whose inputs are measured: a linear one, or another with one weight matrix, such as a router."""
    weight = getattr(module, "weight", None)
    if is_linear(_base(module)) or isinstance(module, nn.Embedding) or getattr(weight, "ndim", 0) != 2:
        return linear_target(module, name)
    return Target(name, (len(cast(Tensor, weight)), cast(Tensor, weight).shape[1]), 0)


def is_linear(module: nn.Module) -> bool:
    """Whether a module without adapters multiplies by one weight matrix, quantised or not, when it is called."""
    if isinstance(module, NonDynamicallyQuantizableLinear):  # nn.MultiheadAttention never calls its output projection
        return False
    return isinstance(module, (nn.Linear, Conv1D)) or quantization(module) is not None


def quantization(module: nn.Module, **requantise: Any) -> QuantizationBackend | None:
    """Return PEFT's access to a quantised layer's weight, None for a plain one; `requantise` is for torchao's merge."""
    return resolve_quantization_backend(module, **{"get_apply_tensor_subclass": _cannot_requantise, **requantise})


def _cannot_requantise() -> None:
    raise AdapterError(
        "this model does not say how its torchao weights were quantised, so nothing can be merged into them; load it "
        "with transformers' TorchAoConfig, or merge into the unquantised model"
    )


def frozen_weight(module: nn.Module) -> Tensor:
    """Return the base weight of a linear layer, adapted or not, as (m, n), dequantised where needed."""
    base: Any = _base(module)
    backend = quantization(base)
    weight = base.weight.data if backend is None else backend.get_base_weight(_unpacked(base))
    return weight.T if isinstance(base, Conv1D) else weight


def keep_unpacked(model: nn.Module) -> None:
    """Keep 4-bit layers as they are: evaluation would pack them on some CPUs, and then no gradient passes."""
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            layer, unpacked = cast(Any, module), _unpacked(module).weight
            layer.hiplora_was_packed = _is_packed(layer)  # which has rounded it
            layer.weight.data, layer.weight.quant_state = unpacked.data, unpacked.quant_state
            layer.support_avx512bf16_for_cpu = False


def _unpacked(base: Any) -> Any:
    """Return an object whose `weight` is a 4-bit layer's as it was before a CPU with AVX512-BF16 repacked it."""
    if not _is_packed(base):
        return base
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    weight = copy.copy(base.weight)
    state = copy.deepcopy(weight.quant_state)
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    return SimpleNamespace(weight=weight)


def _is_packed(base: Any) -> bool:
    return getattr(getattr(getattr(base, "weight", None), "quant_state", None), "packing_format_for_cpu", False)


def precision(module: nn.Module) -> str:
    """Name how the base weight of a linear layer is stored: a dtype, or the quantisation backend."""
    base: Any = _base(module)
    backend = quantization(base)
    if backend is None:
        return str(base.weight.dtype).removeprefix("torch.")
    packed = _is_packed(base) or getattr(base, "hiplora_was_packed", False)
    return f"{backend.backend_name}{' packed' if packed else ''}"


def for_module(pattern: dict[str, Any], name: str, default: Any) -> Any:
    """Return a module's own value from one of PEFT's patterns (`rank_pattern`), else the default."""
    return pattern.get(pattern_key(pattern, name), default)


def pattern_key(pattern: Iterable[str], name: str) -> str:
    """Return the key of a pattern that matches a module, or all experts of its list; else the module's name."""
    keys, experts = list(pattern), _aliases(name.rpartition(".")[0]) if shared_side(name) else []
    return next((key for alias in (name, *experts) if (key := get_pattern_key(keys, alias)) in keys), name)


def default_targets(model: nn.Module, preset: str = "function-aware") -> list[str]:
    """Return the `target_modules` of a preset for this model: its MLP projections, or the paper's attention ones.

    A model with neither, such as Mamba, has all linear layers that its blocks call. The names are as short as they can
    be without matching another module; experts have those of their 3-D parameters. In a multimodal model that generates
    text, they are the text decoder's, without layers that only pictures reach. ConfigError if none can be recognised.
    """
    role = _ROLES[preset]
    with unrolled(model):
        modules = _whole_modules(model)
    linear = [name for name, module in modules.items() if isinstance(module, ExpertList) or is_linear(_base(module))]
    chosen = [name for name in linear if _role(name) == role]
    if not any(map(_role, linear)):
        chosen = [name for name in linear if re.search(r"\.\d+\.", name) and not _read_by_kernels(model, name)]
    if chosen and getattr(model, "can_generate", bool)():
        chosen = _of_text(model, chosen) or chosen
    if not chosen:
        raise ConfigError(
            f"target_modules is not set, and no {role} projections were recognised in {type(model).__name__}; set it "
            "to a list of module names, a regular expression or 'all-linear'"
        )
    return short_names(model, chosen)


def _of_text(model: Any, names: Sequence[str]) -> list[str]:
    """Return the names of the modules that every text runs through: the decoder's, which has the input embeddings."""
    cross_layers = {
        str(index) for index in getattr(model.config.get_text_config(), "cross_attention_layers", None) or ()
    }
    embeddings = None if model.config.is_encoder_decoder else input_embeddings(model)
    decoder = next((f"{name}." for name, module in model.named_modules() if module is embeddings), "")
    while not any(name.startswith(decoder) for name in names):
        decoder = decoder[: decoder[:-1].rfind(".") + 1]
    reached = []
    for name in names:
        parts = name.lower().split(".")
        aside = any(_TOWER.fullmatch(part) or _ADAPTER.fullmatch(part) for part in parts) or cross_layers & {*parts}
        if name.startswith(decoder) and not aside:
            reached.append(name)
    return reached


def short_names(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return each module's name by the fewest trailing parts which no other module's name ends with."""
    with unrolled(model):
        modules = _whole_modules(model)
    chosen = [name if name in modules else name.rpartition(".")[0] for name in names]  # an expert by its list
    others = {tail for name in modules.keys() - set(chosen) for tail in _tails(name)}
    return list(dict.fromkeys(next(tail for tail in _tails(name) if tail not in others) for name in chosen))


def _role(name: str) -> str:
    """Return whether a module is part of a numbered block's "attention" or "MLP"; else an empty string."""
    *parents, leaf = name.lower().split(".")
    if not any(part.isdigit() for part in parents) or any(map(_ROUTER.fullmatch, (*parents, leaf))):
        return ""
    if any(map(_ATTENTION.fullmatch, parents)):
        return "attention"
    if (
        _MLP_PROJECTION.fullmatch(leaf)
        or (parents[-1], leaf) in _MLP_PAIRS
        or any(map(_MLP_CONTAINER.fullmatch, parents))
    ):
        return "MLP"
    return "attention" if _ATTENTION_PROJECTION.fullmatch(leaf) else ""


_ROLES = {"function-aware": "MLP", "paper": "attention"}


def _aliases(experts: str) -> list[str]:
    """Return the names by which a configuration may mean a list of experts."""
    parent, _, projection = experts.rpartition(".")
    return [f"{parent}.{alias}" for alias in ALIASES[projection]]


def _base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the named modules of the base model, without those inside adapted layers."""
    named = dict(model.named_modules())
    inside = tuple(f"{name}." for name, module in named.items() if isinstance(module, BaseTunerLayer))
    return {name: module for name, module in named.items() if name and not name.startswith(inside)}


def _whole_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the base model's modules, with lists of experts but without their experts."""
    modules = _base_modules(model)
    return {n: m for n, m in modules.items() if not isinstance(modules.get(n.rpartition(".")[0]), ExpertList)}


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _read_by_kernels(model: nn.Module, name: str) -> bool:
    """Whether a layer is one of a Mamba mixer's whose weight the fused kernels take without calling it."""
    parent, _, leaf = name.rpartition(".")
    if leaf not in ("x_proj", "dt_proj", "out_proj"):
        return False
    return all(hasattr(model.get_submodule(parent), part) for part in ("A_log", "in_proj"))


def _tails(name: str) -> list[str]:
    """Return the ends of a name, from its last part to the whole."""
    return [*itertools.accumulate(reversed(name.split(".")), lambda tail, part: f"{part}.{tail}")]


def refuse_unmatched(config: Any, names: list[str]) -> None:
    """Raise ConfigError if a pattern matches none of the adapted modules, and would be ignored."""
    for field in PATTERNS.values():
        for pattern in getattr(config, field):
            if not any(pattern_key([pattern], name) == pattern for name in names):
                raise ConfigError(f"{field}[{pattern!r}] matches no adapted module, such as '{names[0]}'; remove it")
