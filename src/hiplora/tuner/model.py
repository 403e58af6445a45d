"""The tuner: puts HiP-LoRA layers into a model, and keeps adapter files honest."""

from __future__ import annotations

import functools
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from tqdm import tqdm

from hiplora.errors import AdapterError, ConfigError
from hiplora.spectral import (
    FactorStore,
    SpectralFactors,
    resolve_rank,
    squared_singular_values,
    weight_fingerprint,
)
from hiplora.tuner import hooks
from hiplora.tuner.buffers import FACTOR_NAMES
from hiplora.tuner.calibration import calibrate
from hiplora.tuner.config import PEFT_TYPE, HipLoraConfig
from hiplora.tuner.layer import HipLoraLinear
from hiplora.tuner.targets import default_targets, for_module
from hiplora.tuner.verify import check_checkpoint, check_fingerprints, check_state_leak, precision


class HipLoraModel(BaseTuner):
    """PEFT's tuner for `HipLoraConfig`; made by `peft.get_peft_model`, not by hand."""

    prefix = "hiplora_"
    tuner_layer_cls = HipLoraLinear
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT's class attribute; see below

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        """Choose the preset's modules where no target is given."""
        if peft_config.target_modules is None:
            peft_config.target_modules = set(default_targets(self.model, peft_config.preset))
        return peft_config

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        super()._check_new_adapter_config(config)
        if isinstance(config, HipLoraConfig) and config.from_checkpoint:
            check_fingerprints(self.model, config)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to every target; on failure the model is left as it was."""
        config: Any = self.peft_config[adapter_name]
        if not config.from_checkpoint:
            config.fingerprints, config.principal_ranks, config.base_precision = {}, {}, ""
            if config.basis == "activation" and not config.calibrated:
                calibrate(model, config)
        # Silent without a terminal, and for the first two seconds.
        self._progress = tqdm(desc="factoring weights", unit=" modules", delay=2, leave=False, disable=None)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._check_patterns(config)
        except BaseException:
            self._withdraw(model, adapter_name)
            raise
        finally:
            self._progress.close()
            config.calibrated = {}

    def _withdraw(self, model: nn.Module, adapter_name: str) -> None:
        """Undo a half-made injection."""
        self.peft_config.pop(adapter_name, None)
        for name, module in list(model.named_modules()):
            if not isinstance(module, HipLoraLinear):
                continue
            if adapter_name in module.hiplora_A:
                module.delete_adapter(adapter_name)
            if not module.hiplora_A:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module.base_layer)

    def _check_patterns(self, config: HipLoraConfig) -> None:
        """Refuse a pattern that matches nothing: it would be accepted and ignored."""
        for field in ("rank_pattern", "alpha_pattern", "principal_rank_pattern"):
            for pattern in getattr(config, field):
                if not any(get_pattern_key([pattern], name) == pattern for name in config.fingerprints):
                    raise ConfigError(
                        f"{field}[{pattern!r}] matches none of the adapted modules, such as "
                        f"'{next(iter(config.fingerprints))}'; correct or remove it"
                    )

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
        layer = target
        if not isinstance(layer, HipLoraLinear):
            layer = HipLoraLinear(target, current_key).train(target.training)
        r = for_module(peft_config.rank_pattern, current_key, peft_config.r)
        alpha = for_module(peft_config.alpha_pattern, current_key, peft_config.lora_alpha)
        k = self._principal_rank(layer, peft_config)
        factorise = functools.partial(self._factorise, layer, peft_config, k)
        saved = peft_config.from_checkpoint and peft_config.save_factors
        layer.add_adapter(adapter_name, peft_config, r, alpha, k, factorise, deferred=saved)
        peft_config.base_precision = peft_config.base_precision or precision(layer)
        hooks.watch(layer)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _principal_rank(self, layer: HipLoraLinear, config: HipLoraConfig) -> int:
        """Return a layer's k; where the configuration leaves it to the layer, it is noted for the adapter's file."""
        spec = for_module(config.principal_rank_pattern, layer.name, config.principal_rank)
        if isinstance(spec, int):
            return spec
        if config.from_checkpoint:
            if layer.name not in config.principal_ranks:
                raise AdapterError(
                    f"layer {layer.name}: adapter_config.json has no principal_ranks entry for it, and principal_rank "
                    f"is {spec!r}; the file is damaged, fetch it again"
                )
            return config.principal_ranks[layer.name]
        if layer.name in config.calibrated:
            k = config.calibrated[layer.name].rank
        else:
            weight = layer.frozen_weight()
            k = resolve_rank(
                spec, (layer.out_features, layer.in_features), lambda: squared_singular_values(weight)
            )
        config.principal_ranks[layer.name] = k
        return k

    def _factorise(self, layer: HipLoraLinear, config: HipLoraConfig, k: int) -> SpectralFactors:
        """Fetch the certified factors of a layer's frozen weight from the store, or compute them."""
        weight = layer.frozen_weight()
        if weight.device.type == "meta":
            raise ConfigError(
                f"layer {layer.name}: its weight is not loaded (meta device); load the base model first"
            )
        if config.basis == "activation":
            factors = self._calibrated(layer, config, k)
        else:
            factors = FactorStore().get_or_compute(weight, k, config.svd_tolerance, name=layer.name)
        config.fingerprints[layer.name] = factors.fingerprint
        self._progress.update()
        return factors

    def _calibrated(self, layer: HipLoraLinear, config: HipLoraConfig, k: int) -> SpectralFactors:
        """Return what the calibration found for a layer, once it is sure to be of this very weight and rank."""
        factors = config.calibrated.get(layer.name)
        if factors is None or factors.rank != k or factors.basis != f"activation:{config.basis_sides}":
            raise ConfigError(
                f"layer {layer.name}: the calibration has no factors of rank {k} for it; the configuration was changed "
                "after hiplora.calibrate(model, config): call it again"
            )
        if factors.fingerprint != weight_fingerprint(layer.frozen_weight()):
            raise ConfigError(
                f"layer {layer.name}: its weight is not the one that was calibrated; call "
                "hiplora.calibrate(model, config) on this very model"
            )
        return factors.to(layer.frozen_weight().device)

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
        for module in model.modules():
            if isinstance(module, HipLoraLinear) and adapter_name in module.hiplora_A:
                module.ensure_factors(adapter_name)
        selected = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        check_state_leak(selected, config, adapter_name)
        # PEFT goes on to add the layer of an adapted output head, base weight and all, from this very dict.
        for key in [key for key in state_dict if ".base_layer." in key]:
            del state_dict[key]
        if config.save_factors:
            return selected
        return {
            key: value for key, value in selected.items() if not any(f".{n}." in key for n in FACTOR_NAMES)
        }

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Match saved tensors to layers, after checking that all are there and fit this base model."""
        assert isinstance(config, HipLoraConfig)
        layers = {
            m.name: m for m in model.modules() if isinstance(m, HipLoraLinear) and adapter_name in m.hiplora_A
        }
        check_checkpoint(layers, config, adapter_name, state_dict)
        for layer in layers.values():
            layer.unshare_factors(adapter_name)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def register() -> None:
    """Make PEFT know HiP-LoRA; calling it again changes nothing.

    The type is a plain string: PEFT's own register function accepts only names of its enum.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = HipLoraConfig  # type: ignore[index]
    PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = HipLoraModel  # type: ignore[index]
    PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = HipLoraModel.prefix  # type: ignore[index]
