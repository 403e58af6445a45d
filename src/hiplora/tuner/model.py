"""The tuner: puts HiP-LoRA layers into a model, and keeps adapter files honest."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from hiplora.errors import AdapterError, ConfigError
from hiplora.spectral import weight_fingerprint
from hiplora.tuner import hooks
from hiplora.tuner.buffers import FACTOR_NAMES
from hiplora.tuner.calibration import calibrate
from hiplora.tuner.config import PEFT_TYPE, HipLoraConfig
from hiplora.tuner.experts import fuse, shared_side, unroll
from hiplora.tuner.factorize import weight_factors
from hiplora.tuner.layer import HipLoraLinear
from hiplora.tuner.targets import Target, default_targets, find_targets, for_module, frozen_weight, left_out
from hiplora.tuner.verify import check_checkpoint, check_fingerprints, check_state_leak, precision


class HipLoraModel(BaseTuner):
    """PEFT's tuner for `HipLoraConfig`; made by `peft.get_peft_model`, not by hand."""

    prefix = "hiplora_"
    tuner_layer_cls = HipLoraLinear
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT's class attribute; see below

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        super()._check_new_adapter_config(config)
        if isinstance(config, HipLoraConfig) and config.from_checkpoint:
            check_fingerprints(self.model, config)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        """Choose the preset's modules where no target is given, and find the factors of all.

        Whatever can go wrong does so here, before any layer is replaced.
        """
        config, model = peft_config, self.model
        if config.target_modules is None and not config.target_parameters:
            config.target_modules = set(default_targets(model, config.preset))
        targets = find_targets(model, config)
        self._target_names = {target.name for target in targets}
        if not config.from_checkpoint:
            config.fingerprints, config.principal_ranks, config.base_precision = {}, {}, ""
            for note in left_out(model, config, targets):
                warnings.warn(note, stacklevel=2)
        _check_patterns(config, [target.name for target in targets])
        fused = unroll(model) if any(map(shared_side, self._target_names)) else {}
        try:
            self._find_factors(config, targets)
        except BaseException:
            fuse(model, fused)
            raise
        return config

    def _find_factors(self, config: HipLoraConfig, targets: list[Target]) -> None:
        """Give the configuration the factors of its targets, unless the adapter's file brings them."""
        model = self.model
        if config.from_checkpoint and config.save_factors:
            return
        if config.basis == "weight":
            config.calibrated = {target.name: factors for target, factors in weight_factors(model, config)}
        elif not config.calibrated:
            calibrate(model, config)
        else:
            _check_calibrated(model, config, targets)

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> Any:  # type: ignore[override]
        """Match what `find_targets` has found, and nothing else."""
        found = super()._check_target_module_exists(peft_config, key)
        return found if isinstance(found, _ExcludedModule) else key in self._target_names

    def _inject_parameters(self, peft_config: Any, *args: Any, **kwargs: Any) -> list[str]:
        """Experts were injected as the layers that they are unrolled to."""
        return list(peft_config.target_parameters)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        fuse(model)
        return model

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
            layer = HipLoraLinear(target, current_key).train(target.training)
        r = for_module(config.rank_pattern, current_key, config.r)
        alpha = for_module(config.alpha_pattern, current_key, config.lora_alpha)
        k = for_module(config.principal_rank_pattern, current_key, config.principal_rank)
        factors = config.calibrated.pop(current_key, None)
        if factors is not None:
            config.fingerprints[current_key] = factors.fingerprint
            if not isinstance(k, int):
                config.principal_ranks[current_key] = factors.rank
        elif not isinstance(k, int) and current_key not in config.principal_ranks:
            raise AdapterError(
                f"layer {current_key}: adapter_config.json has no principal_ranks entry for it, and principal_rank is "
                f"{k!r}; the file is damaged, fetch it again"
            )
        layer.add_adapter(adapter_name, config, r, alpha, config.principal_ranks.get(current_key, k), factors)
        config.base_precision = config.base_precision or precision(layer)
        hooks.watch(layer)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Select what is saved; an adapter that left the complement is refused."""
        assert isinstance(config, HipLoraConfig)
        for layer in _layers(model, adapter_name).values():
            layer.ensure_factors(adapter_name)
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        check_state_leak(selected, config, adapter_name)
        # PEFT goes on to add the layer of an adapted output head, base weight and all, from this very dict.
        for key in [key for key in state_dict if ".base_layer." in key]:
            del state_dict[key]
        left_out = () if config.save_factors else FACTOR_NAMES
        return {key: value for key, value in selected.items() if not any(f".{n}." in key for n in left_out)}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Match saved tensors to layers, after checking that all are there and fit this base model."""
        assert isinstance(config, HipLoraConfig)
        layers = _layers(model, adapter_name)
        for name, tensors in check_checkpoint(layers, config, adapter_name, state_dict).items():
            layers[name].load_factors(adapter_name, tensors)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _layers(model: nn.Module, adapter: str) -> dict[str, HipLoraLinear]:
    return {m.name: m for m in model.modules() if isinstance(m, HipLoraLinear) and adapter in m.hiplora_A}


def _check_patterns(config: HipLoraConfig, names: list[str]) -> None:
    """Refuse a pattern that matches nothing: it would be accepted and ignored."""
    for field in ("rank_pattern", "alpha_pattern", "principal_rank_pattern"):
        for pattern in getattr(config, field):
            if not any(get_pattern_key([pattern], name) == pattern for name in names):
                raise ConfigError(
                    f"{field}[{pattern!r}] matches none of the adapted modules, such as '{names[0]}'; correct or "
                    "remove it"
                )


def _check_calibrated(model: nn.Module, config: HipLoraConfig, targets: Iterable[Target]) -> None:
    """Check that what was calibrated is of these very weights, and of the ranks and sides that are now asked for."""
    for name, k in ((target.name, target.k) for target in targets):
        factors = config.calibrated.get(name)
        fits = factors is not None and (not isinstance(k, int) or factors.rank == k)
        if factors is None or not fits or factors.basis != f"activation:{config.basis_sides}":
            raise ConfigError(
                f"layer {name}: the calibration has no factors of rank {k} for it; the configuration was changed after "
                "hiplora.calibrate(model, config): call it again"
            )
        if factors.fingerprint != weight_fingerprint(frozen_weight(model.get_submodule(name))):
            raise ConfigError(
                f"layer {name}: its weight is not the one that was calibrated; call hiplora.calibrate(model, config) "
                "on this very model"
            )


def register() -> None:
    """Make PEFT know HiP-LoRA; calling it again changes nothing.

    The type is a plain string: PEFT's own register function accepts only names of its enum.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = HipLoraConfig  # type: ignore[index]
    PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = HipLoraModel  # type: ignore[index]
    PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = HipLoraModel.prefix  # type: ignore[index]
