"""The tuner: puts HiP-LoRA layers into a model, and keeps adapter files honest."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.lora.model import _get_encoder
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn

from hiplora.errors import AdapterError, ConfigError
from hiplora.spectral import SpectralFactors, weight_sample
from hiplora.tuner.calibration import calibrate_itself, check_calibrated, weight_factors
from hiplora.tuner.config import HipLoraConfig
from hiplora.tuner.experts import fuse, shared_side, unroll
from hiplora.tuner.layer import HipLoraLinear
from hiplora.tuner.state import (
    FACTOR_NAMES,
    check_checkpoint,
    check_fingerprints,
    factor_names,
    file_names,
    layer_of,
    retracted_state,
)
from hiplora.tuner.targets import (
    Target,
    find_targets,
    for_module,
    frozen_weight,
    keep_unpacked,
    left_out,
    precision,
    refuse_unmatched,
    short_names,
)


class HipLoraModel(BaseTuner):
    """PEFT's tuner for `HipLoraConfig`; made by `peft.get_peft_model`, not by hand."""

    prefix = "hiplora_"
    tuner_layer_cls = HipLoraLinear
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT's class attribute; see below
    _rowless_layer: tuple[int, str | None] = (
        0,
        None,
    )  # number of layers, and one whose inputs are not the model's rows
    _unloaded_hook: Any = None  # handle of the hook for a pass before any file has brought the tensors

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Return the names of the frozen factors: they are broadcast here, once, and not by DDP before every pass."""
        factors = {name: buffer for name, buffer in self.named_buffers() if f".{self.prefix}" in name}
        for buffer in factors.values() if torch.distributed.is_initialized() else ():
            torch.distributed.broadcast(buffer, 0)
        return [*factors, *(f"base_model.{name}" for name in factors)]

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        super()._check_new_adapter_config(config)
        keep_unpacked(self.model)
        if isinstance(config, HipLoraConfig) and config.from_checkpoint:
            check_fingerprints(self.model, config)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        """Choose modules where no target is set, and find the factors of all, before anything is replaced."""
        config, model = peft_config, self.model
        targets = find_targets(model, config)
        self._target_names = {target.name for target in targets}
        refuse_unmatched(config, [target.name for target in targets])
        if not config.calibrated and (shared := _shared_factors(model, config, targets)):
            config.calibrated = shared
            return config
        if not config.from_checkpoint:
            if config.fingerprints:  # of another model's adapter, which keeps this object
                config = copy.copy(config)
                self.peft_config |= {name: config for name, other in self.peft_config.items() if other is peft_config}
            config.fingerprints, config.weight_samples = {}, {}
            config.principal_ranks, config.base_precision = {}, ""
            for note in left_out(model, config, targets):
                warnings.warn(note, stacklevel=2)
        fused = unroll(model) if any(map(shared_side, self._target_names)) else {}
        config.awaits_file = config.from_checkpoint and config.save_factors
        if config.awaits_file and self._unloaded_hook is None:
            self._unloaded_hook = model.register_forward_pre_hook(self._start_unloaded)
        try:
            if not config.awaits_file:
                if config.basis == "weight":
                    config.calibrated = {target.name: factors for target, factors in weight_factors(model, config)}
                elif not config.calibrated:
                    calibrate_itself(model, config)
                else:
                    check_calibrated(model, config, targets)
                _check_complement(config, targets)
        except BaseException:
            fuse(model, fused)
            raise
        if config.target_modules is None:
            config.target_modules = set(short_names(model, self._target_names))
        return config

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> Any:  # type: ignore[override]
        """Match exactly the targets of `find_targets`."""
        match = super()._check_target_module_exists(peft_config, key)
        return match if isinstance(match, _ExcludedModule) else key in self._target_names

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Replace as PEFT does; a module without adapters has its weights already, if it has any."""
        if hasattr(new_module, "base_layer"):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            setattr(parent, child_name, new_module)

    def _inject_parameters(self, peft_config: Any, *args: Any, **kwargs: Any) -> list[str]:
        return list(peft_config.target_parameters)  # injected already, as the layers that experts are unrolled to

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)  # type: ignore[func-returns-value]
        fuse(model)
        return model

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast as PEFT does; project again, to the accuracy of fp32, what was cast from half precision."""
        before = {layer: layer.hiplora_A[adapter_name].dtype for layer in _layers(self, adapter_name).values()}
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer, dtype in before.items():
            if layer.hiplora_A[adapter_name].dtype != dtype and adapter_name not in layer.pending:
                layer.retract_(adapter_name)

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
        config, layer = peft_config, target
        if not isinstance(layer, HipLoraLinear):
            layer = HipLoraLinear(target, current_key, **get_quantization_kwargs(self.model)).train(target.training)
        r = for_module(config.rank_pattern, current_key, config.r)
        alpha = for_module(config.alpha_pattern, current_key, config.lora_alpha)
        k = for_module(config.principal_rank_pattern, current_key, config.principal_rank)
        factors = config.calibrated.pop(current_key, None)
        if factors is not None:
            config.fingerprints[current_key] = factors.fingerprint
            if current_key not in config.weight_samples:
                config.weight_samples[current_key] = weight_sample(frozen_weight(layer), current_key)
            if not isinstance(k, int):
                config.principal_ranks[current_key] = factors.rank
        elif not isinstance(k, int) and current_key not in config.principal_ranks:
            raise AdapterError(
                f"layer {current_key}: adapter_config.json has no principal_ranks entry for it, and principal_rank is "
                f"{k!r}; the file is damaged, fetch it again"
            )
        layer.add_adapter(adapter_name, config, r, alpha, config.principal_ranks.get(current_key, k), factors)
        config.base_precision = config.base_precision or precision(layer)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)
            if isinstance(parent, nn.TransformerEncoderLayer):
                # torch calls the layer in evaluation too: its fused encoder pass leaves out modules that have a hook.
                layer.register_forward_pre_hook(_no_fast_path)
                for module in self.model.modules():
                    if isinstance(module, nn.TransformerEncoder):
                        module.use_nested_tensor = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; PEFT passes MPT's `adapter_names` on to this method, and MPT drops them."""
        if kwargs.get("adapter_names") is None:
            return super().forward(*args, **kwargs)
        with self._enable_peft_forward_hooks(**kwargs):
            return super().forward(*args, **{key: kwargs[key] for key in kwargs.keys() - {"adapter_names"}})

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Prepare a pass of the PEFT model: start adapters without a file, and tell the layers each row's adapter."""
        for adapter in self.active_adapters:
            self._start_untrained(adapter)
        with ExitStack() as handles:
            if (names := kwargs.get("adapter_names")) is not None:
                for handle in self._hook_rows(list(names), kwargs.get("num_beams") or 1):
                    handles.callback(handle.remove)
            yield

    def _start_untrained(self, adapter: str) -> bool:
        """Start an adapter whose configuration is from a file, but whose tensors are not, calibrated if need be.

        Returns whether it was one.
        """
        config: Any = self.peft_config[adapter]
        if not getattr(config, "awaits_file", False):
            return False
        config.awaits_file = False
        layers = [layer for layer in _layers(self, adapter).values() if not layer.has_factors(adapter)]
        if layers and config.basis != "weight":
            with_ranks = copy.copy(config)
            with_ranks.principal_rank_pattern = {**config.principal_ranks, **config.principal_rank_pattern}
            calibrate_itself(self.model, with_ranks)
            config.calibration = with_ranks.calibration
            for layer in layers:
                layer.start_untrained(adapter, with_ranks.calibrated[layer.name])
        for layer in layers:
            layer.ensure_factors(adapter)
        return bool(layers)

    def _start_unloaded(self, *_: Any) -> None:
        """Start adapters without a file in a pass without PEFT's model (transformers' own interface)."""
        if torch.compiler.is_compiling():
            return
        self._unloaded_hook.remove()
        self._unloaded_hook = None
        for adapter in self.peft_config:
            if self._start_untrained(adapter):
                warnings.warn(
                    f"adapter '{adapter}' has a configuration from a file, but none of the tensors, so it begins anew, "
                    "untrained; if a file was to bring them, transformers does not find its names: load it with "
                    "peft.PeftModel.from_pretrained(base, folder)",
                    stacklevel=2,
                )

    def _hook_rows(self, names: list[str], beams: int) -> list[Any]:
        layers = [module for module in self.modules() if isinstance(module, HipLoraLinear)]
        if self.training:
            raise AdapterError("Cannot pass `adapter_names` when the model is in training mode, call `eval` first.")
        if any(layer.merged for layer in layers):
            raise AdapterError("Cannot pass `adapter_names` with merged adapters, call `unmerge_adapter` first.")
        adapters = {name for layer in layers for name in layer.hiplora_A}
        if unknown := sorted(set(names) - adapters - {"__base__"}):
            raise AdapterError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; the model has "
                f"{', '.join(sorted(adapters))}, and '__base__' for the bare model"
            )
        if expert := next((layer.name for layer in layers if shared_side(layer.name)), None):
            raise AdapterError(
                f"layer {expert}: an expert gets tokens, not rows; run one adapter at a time, not a mix"
            )
        if self._rowless_layer[0] != len(layers):
            self._rowless_layer = len(layers), _layer_without_rows(self.model, layers)
        if self._rowless_layer[1] is not None:
            raise AdapterError(
                f"layer {self._rowless_layer[1]}: this model does not give it one row of the batch after the other, so "
                "that rows cannot have adapters of their own; run one adapter at a time, not a mix"
            )
        # Beam search repeats the rows, but not those of an encoder.
        encoder = _get_encoder(self.model) if beams > 1 else None
        once = set() if encoder is None else set(encoder.modules())
        repeated = [name for name in names for _ in range(beams)]

        def name_rows(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            return args, {**kwargs, "adapter_names": names if module in once else repeated}

        hooked = [module for module in self.modules() if isinstance(module, (HipLoraLinear, AuxiliaryTrainingWrapper))]
        return [module.register_forward_pre_hook(name_rows, with_kwargs=True) for module in hooked]

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: adapters are combined in their folders, by one of the rules of `hiplora.merging`."""
        raise AdapterError(
            "add_weighted_adapter is PEFT's for LoRA and IA³; save the HiP-LoRA adapters and combine them with "
            "hiplora.merging.merge(folders, method=…, weights=…) (hiplora merge), or export them to LoRA first"
        )

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Select the tensors to save: δ and the factors as they act, whatever the parameters hold while they train."""
        layers = _layers(model, adapter_name)
        for layer in layers.values():
            layer.ensure_factors(adapter_name)
        for key in [key for key in state_dict if ".base_layer.hiplora_" in key]:  # inside another tuner's layer
            state_dict[key.replace(".base_layer", "")] = state_dict.pop(key)
        for key in list(state_dict):  # one of the trainable parameters alone has no factors
            prefix, is_A, _ = key.partition(f".hiplora_A.{adapter_name}")
            if is_A and (owner := layers.get(layer_of(key))) is not None:
                for kind in factor_names(config):
                    state_dict.setdefault(f"{prefix}.{kind}.{adapter_name}", getattr(owner, kind)[adapter_name])
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        # FSDP1 gathers tensors under names without its wrappers, which PEFT does not find.
        selected |= {key: value for key, value in state_dict.items() if layer_of(key) in layers}
        selected = retracted_state(selected, config, adapter_name)
        for key, scale in _gain_scales(selected, layers, adapter_name):
            selected[key] = selected[key] * scale
        # PEFT goes on to add the layer of an adapted output head, base weight and all, from this very dict.
        for key in [key for key in state_dict if ".base_layer." in key]:
            del state_dict[key]
        unsaved = () if config.save_factors else FACTOR_NAMES
        return {key: value for key, value in selected.items() if not any(f".{name}." in key for name in unsaved)}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Match saved tensors to layers, after checking that none is missing and all fit this base model."""
        config.awaits_file, layers = False, _layers(model, adapter_name)
        named = file_names(state_dict, layers)
        for name, tensors in check_checkpoint(layers, config, adapter_name, named).items():
            layers[name].load_factors(adapter_name, tensors)
        for name, layer in layers.items() if not config.save_factors else ():  # computed already, and not missing
            named |= {f"base_model.model.{name}.{kind}": getattr(layer, kind)[adapter_name] for kind in FACTOR_NAMES}
        for key, scale in _gain_scales(named, layers, adapter_name):
            named[key] = named[key] / scale
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, named)


@torch.no_grad()
def _layer_without_rows(model: Any, layers: Iterable[HipLoraLinear]) -> str | None:
    """Return a layer whose inputs do not begin with the model's rows, such as Longformer's, by a small pass."""
    lengths: list[tuple[int, str]] = []

    def record(layer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        lengths.append((len(next(iter((*args, *kwargs.values())))), layer.name))

    rows = -1
    with ExitStack() as handles, suppress(Exception):  # models that need more, or other, than tokens
        for layer in layers:
            handles.callback(layer.register_forward_pre_hook(record, with_kwargs=True).remove)
        tokens = {key: value.clamp(max=1).to(model.device) for key, value in model.dummy_inputs.items()}
        rows = len(tokens["input_ids"])
        model(**tokens)
    return next((name for length, name in lengths if length != rows), None)


def _no_fast_path(module: nn.Module, args: tuple) -> None:
    """Do nothing: torch leaves its fast path where a module has a hook."""


def _layers(model: nn.Module, adapter: str) -> dict[str, HipLoraLinear]:
    return {m.name: m for m in model.modules() if isinstance(m, HipLoraLinear) and adapter in m.hiplora_A}


def _gain_scales(
    state: Mapping[str, Tensor], layers: Mapping[str, HipLoraLinear], adapter: str
) -> list[tuple[str, Tensor]]:
    """Return the keys of gains that are δ in a file and ρ = δ/σ in the model, each with the factor between them."""
    keys = [key for key in state if ".hiplora_delta" in key and layer_of(key) in layers]
    scales = {key: layers[layer_of(key)].gain_scale(adapter) for key in keys}
    return [(key, scale.to(state[key].device)) for key, scale in scales.items() if scale is not None]


def _shared_factors(
    model: nn.Module, config: HipLoraConfig, targets: Sequence[Target]
) -> dict[str, SpectralFactors] | None:
    """Return the factors of an adapter in the model that has this configuration object, or one of the same basis."""
    layers = [module for module in model.modules() if isinstance(module, HipLoraLinear)]
    for adapter, other in {name: found for layer in layers for name, found in layer.configs.items()}.items():
        if other is config or (config.from_checkpoint and _basis_of(other) == _basis_of(config)):
            adapted = {m.name: m for m in layers if adapter in m.configs and m.has_factors(adapter)}
            names = [target.name for target in targets if target.name in adapted]
            factors = {n: adapted[n].spectral_factors(adapter, other, other.fingerprints[n]) for n in names}
            if all(t.name in factors and (factors[t.name].rank == t.k or not isinstance(t.k, int)) for t in targets):
                return factors
    return None


def _basis_of(config: HipLoraConfig) -> list[Any]:
    """Return the settings that decide an adapter's factors, and the weights and text that these were made from."""
    names = ("basis", "basis_sides", "projection", "svd_tolerance", "fingerprints", "calibration")
    ranks = ("principal_rank", "principal_rank_pattern", "principal_ranks")
    return [getattr(config, name) for name in (*names, *ranks)]


def _check_complement(config: HipLoraConfig, targets: Iterable[Target]) -> None:
    """Refuse a layer in which nothing could learn; warn where only the gains can, or r exceeds the complement."""
    problems: dict[str, list[str]] = {}  # by remedy, layer by layer
    for target in targets if config.is_closed else ():
        k, r = config.calibrated[target.name].rank, for_module(config.rank_pattern, target.name, config.r)
        sides = zip(("output", "input"), target.shape, strict=True)
        complements = [(n - k * (config.basis_sides in ("both", side)), n, side) for side, n in sides]
        free, n, side = min(complements, key=lambda complement: complement[0])
        if r > free > 0:
            problem = f"layer {target.name}: r {r} is above the {free} directions that principal_rank {k} leaves"
            problems.setdefault("lower one of them, or set rank_pattern or principal_rank_pattern", []).append(problem)
        if free <= 0:
            problem = f"layer {target.name}: principal_rank {target.k!r} protects all of its {n} {side}s"
            remedy = "lower it (principal_rank_pattern sets one layer's), or leave the layer out (exclude_modules)"
            if not config.principal_channel:
                raise ConfigError(f"{problem}, so nothing in it could learn; {remedy}")
            problems.setdefault(remedy, []).append(f"{problem}, so that only its gains learn")
    for remedy, (first, *more) in problems.items():
        warnings.warn(first + f" (and so in {len(more)} more)" * bool(more) + f"; {remedy}", stacklevel=2)
