"""One adapted linear layer: LoRA's factors in the complement, gains on the protected directions."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hiplora.errors import AdapterError
from hiplora.spectral import (
    FactorStore,
    SpectralFactors,
    budget_weights,
    full_precision,
    fused_factors,
    leak,
    penalty,
    protected,
    soften,
)
from hiplora.tuner.config import HipLoraConfig
from hiplora.tuner.functional import add_channels, observed, retracted
from hiplora.tuner.state import (
    FactorBuffers,
    FactorDict,
    Watch,
    check_checkpoint,
    factor_names,
    factor_tensors,
    is_flat,
    is_sharded,
    note_leaks,
    own_part,
)
from hiplora.tuner.targets import frozen_weight, linear_target, quantization


class HipLoraLinear(FactorBuffers, BaseTunerLayer):
    """HiP-LoRA around a frozen `nn.Linear`, `Conv1D` or quantised linear layer of shape (m, n) = (out, in).

    Per adapter: parameters `hiplora_A` (r, n), `hiplora_B` (m, r), `hiplora_delta` (k,), and frozen fp32 buffers
    `hiplora_U` (m, k), `hiplora_sigma` (k,), `hiplora_V` (n, k), shared between adapters where they are equal.
    """

    cast_input_dtype_enabled = True  # PEFT's disable_input_dtype_casting asks for it; a pass casts in any case
    adapter_layer_names = ("hiplora_A", "hiplora_B", "hiplora_delta")
    other_param_names = ("r", "scaling", "hiplora_dropout", "configs", "_budget")

    def __init__(self, base_layer: nn.Module, name: str, **requantise: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.out_features, self.in_features = linear_target(base_layer, name).shape
        self.transposed = isinstance(self.get_base_layer(), Conv1D)
        self.quantization_backend = quantization(self.get_base_layer(), **requantise)
        self.hiplora_A, self.hiplora_B, self.hiplora_delta = FactorDict(), FactorDict(), FactorDict()
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.hiplora_dropout = nn.ModuleDict()  # only the probability is used; modules, so that TRL can set it to 0
        self.configs: dict[str, HipLoraConfig] = {}
        self._budget: dict[str, Tensor] = {}
        self._hooked: set[str] = set()  # adapters whose gains are in an optimizer that the hooks have seen
        self._unretracted: set[str] = set()  # adapters that may have been trained since they were last retracted
        # The base weight while merged, or the quantised layer; a list keeps it from being registered as a child.
        self._frozen: list[Any] = []
        self.merged_adapters: list[str] = []
        self._active_adapter = []
        self.register_load_state_dict_post_hook(note_leaks)

    def add_adapter(
        self, adapter: str, config: HipLoraConfig, r: int, alpha: float, k: int, factors: SpectralFactors | None
    ) -> None:
        """Add an adapter of residual rank `r`, scale `alpha / r` and principal rank `k`; factors may come later."""
        self.r[adapter], self.scaling[adapter] = r, alpha / r
        self.hiplora_dropout[adapter] = nn.Dropout(config.lora_dropout)
        self.configs[adapter] = config
        m, n = self.out_features, self.in_features
        self.hiplora_A[adapter], self.hiplora_B[adapter] = (nn.Parameter(torch.empty(s)) for s in ((r, n), (m, r)))
        if config.principal_channel:
            self.hiplora_delta[adapter] = nn.Parameter(torch.empty(k))
        if factors is None:
            self.pending.add(adapter)
            sizes = {"hiplora_U": (m, k), "hiplora_sigma": (k,), "hiplora_V": (n, k)}
            for name in factor_names(config):
                getattr(self, name)[adapter] = torch.full(sizes.get(name, (k, k)), math.nan)
        else:
            self.place_factors(adapter, factor_tensors(config, factors))
        self.live.add(self)
        self._initialise(adapter)
        self._move_adapter_to_device_of_base_layer(adapter)
        if factors is not None:
            self.retract_(adapter)

    @torch.no_grad()
    def _initialise(self, adapter: str) -> None:
        """Fill A, B and δ as `init_weights` says, or with NaN while a file is expected to bring them."""
        A, B, *gains = (parameters[adapter] for parameters in self.parameters_of(adapter).values())
        init_weights = self.configs[adapter].init_weights
        for parameter in (A, B, *gains):
            parameter.fill_(math.nan if adapter in self.pending else 0.0)
        if adapter in self.pending or init_weights == "zero":
            return
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        if init_weights is False:
            nn.init.kaiming_uniform_(B, a=math.sqrt(5))
            for delta in gains:
                nn.init.normal_(delta, std=0.02)

    def load_factors(self, adapter: str, tensors: dict[str, Tensor]) -> None:
        """Take an adapter's factors from a file: as its own buffers, or another adapter's where they are equal."""
        device, names = self.hiplora_U[adapter].device, factor_names(self.configs[adapter])
        self.place_factors(adapter, {n: tensors[n].to(device, torch.float32) for n in names if n in tensors})
        self.pending.discard(adapter)
        self._budget.pop(adapter, None)
        self._watches.pop(adapter, None)

    def parameters_of(self, adapter: str) -> dict[str, FactorDict]:
        """Return the dictionaries that have an adapter's A, B and, if it has gains, δ, by kind."""
        kinds = {kind: getattr(self, kind) for kind in self.adapter_layer_names}
        return {kind: parameters for kind, parameters in kinds.items() if adapter in parameters}

    @torch.no_grad()
    def ensure_factors(self, adapter: str) -> None:
        """Check that an adapter has the tensors that a file should bring; without a file it starts untrained."""
        if adapter not in self.pending:
            return
        config = self.configs[adapter]
        if self.has_factors(adapter):
            if self.hiplora_A[adapter].isnan().any():
                raise AdapterError(
                    f"layer {self.name}: adapter '{adapter}' was saved by hiplora 0.1, or without PEFT, under names "
                    "that transformers does not find; load it with peft.PeftModel.from_pretrained(base, folder), and "
                    "save it again"
                )
            tensors = self.parameters_of(adapter) | {name: getattr(self, name) for name in factor_names(config)}
            state = {f"{self.name}.{kind}": by_adapter[adapter] for kind, by_adapter in tensors.items()}
            check_checkpoint({self.name: self}, config, adapter, state)
            self.pending.remove(adapter)
            if (scale := self.gain_scale(adapter)) is not None:  # a file holds δ
                self.hiplora_delta[adapter].div_(scale)
            return
        if config.basis != "weight":
            raise AdapterError(
                f"layer {self.name}: no factors were loaded for adapter '{adapter}', whose basis is measured on the "
                "whole model; run the PEFT model once, or call hiplora.calibrate before adding the adapter"
            )
        weight, k = frozen_weight(self), len(self.hiplora_sigma[adapter])
        self.start_untrained(adapter, FactorStore().get_or_compute(weight, k, config.svd_tolerance, name=self.name))

    @torch.no_grad()
    def start_untrained(self, adapter: str, factors: SpectralFactors) -> None:
        """Initialise an adapter whose tensors no file has brought, on these factors."""
        self.pending.remove(adapter)
        for name, tensor in factor_tensors(self.configs[adapter], factors).items():
            getattr(self, name)[adapter].copy_(tensor)  # in place: a state dict may hold the buffer
        self._initialise(adapter)
        self.retract_(adapter)

    def train(self, mode: bool = True) -> Any:
        """Check what transformers has written into the layer: its loads end here, and a compiled pass cannot."""
        for adapter in [one for one in self.pending if self.has_factors(one)]:
            self.ensure_factors(adapter)
        return super().train(mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; another one becomes active if it was the active one (as in PEFT)."""
        BaseTunerLayer.delete_adapter(self, adapter_name)
        for buffers in self.factors_of(adapter_name).values():
            del buffers[adapter_name]
        for names in (self.pending, self._hooked, self._unretracted):
            names.discard(adapter_name)
        self._watches.pop(adapter_name, None)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._watches.clear()  # no optimizer moved the gains that a checkpoint brings
        self._budget.clear()  # it may bring other σ
        super()._load_from_state_dict(*args)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move parameters to the base layer's device and dtype (as in PEFT), factors to its device only."""
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        device = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        if device is not None:
            factors = {
                name: buffers[adapter_name].to(device) for name, buffers in self.factors_of(adapter_name).items()
            }
            self.place_factors(adapter_name, factors)  # shares again what PEFT assigned

    @torch.no_grad()
    def retract_(self, adapter: str) -> None:
        """Project A and B onto the complement in place (Eq. 4); nothing where the projection is off or soft.

        Flat shards of FSDP1 stay as they are: they act through the projection, and are saved through it.
        """
        A, B = self.hiplora_A.parameter(adapter), self.hiplora_B.parameter(adapter)
        if not self.configs[adapter].is_closed or A.device.type == "meta" or is_flat(A):
            return
        whole = self.hiplora_A.whole(adapter), self.hiplora_B.whole(adapter)
        for parameter, value in zip((A, B), self.retracted(adapter, *whole), strict=True):
            parameter.copy_(own_part(value, parameter))
        self._unretracted.discard(adapter)

    def retracted(self, adapter: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return A and B, fp32 at least, in the complement of an adapter's protected directions (Eq. 4)."""
        self.ensure_factors(adapter)
        # A caller may have switched on TF32 or autocast, which would leave a leak of a thousandth.
        with full_precision(A.device):
            return retracted(A, B, self.hiplora_U[adapter], self.hiplora_V[adapter], self.configs[adapter].basis_sides)

    def leak(self, adapter: str) -> float:
        """Return the larger of ‖UᵀB‖/‖B‖ and ‖AV‖/‖A‖; 0 where the projection is off or soft."""
        if not self.configs[adapter].is_closed:
            return 0.0
        A, B, U, V = self._residual(adapter)
        return leak(A, B, *protected(U, V, self.configs[adapter].basis_sides))

    def _projected_sides(self, adapter: str) -> str | None:
        """Return the sides on which a pass projects A and B, as it does while they train; else None."""
        config, is_observed = self.configs[adapter], observed()
        if not config.is_closed:
            return None
        if not is_observed and self._trains(self.hiplora_A.parameter(adapter), self.hiplora_B.parameter(adapter)):
            self._unretracted.add(adapter)
        return config.basis_sides if is_observed or adapter in self._unretracted else None

    def _trains(self, *parameters: Tensor) -> bool:
        """Whether this pass may be part of training any of these parameters."""
        return (self.training or torch.is_grad_enabled()) and any(p.requires_grad for p in parameters)

    def _softened(self, adapter: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return A and B as they act: through the soft projection where there is one."""
        if self.configs[adapter].projection == "hard":
            return A, B
        filters = [dict(buffers.items()).get(adapter) for buffers in (self.hiplora_shrink_U, self.hiplora_shrink_V)]
        soft_A, soft_B = soften(A.float(), B.float(), self.hiplora_U[adapter], self.hiplora_V[adapter], *filters)
        return soft_A.to(A.dtype), soft_B.to(B.dtype)

    def _residual(self, adapter: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (A, B, U, V), fp32 at least."""
        self.ensure_factors(adapter)
        A, B = self.hiplora_A.whole(adapter).detach(), self.hiplora_B.whole(adapter).detach()
        dtype = torch.promote_types(A.dtype, torch.float32)
        return A.to(dtype), B.to(dtype), self.hiplora_U[adapter].to(dtype), self.hiplora_V[adapter].to(dtype)

    def gain_scale(self, adapter: str) -> Tensor | None:
        """Return the factor from the gains' parameter to δ: σ where it holds ρ = δ/σ, 1 where σ is 0; else None."""
        if not self.configs[adapter].relative_gains:
            return None
        self.ensure_factors(adapter)
        sigma = self.hiplora_sigma[adapter]
        return torch.where(sigma > 0, sigma, 1.0)

    def gains(self, adapter: str) -> Tensor | None:
        """Return δ (k,), differentiable; None for an adapter without principal channel."""
        if adapter not in self.hiplora_delta:
            return None
        scale, gains = self.gain_scale(adapter), self.hiplora_delta.acting(adapter)
        return gains if scale is None else gains * scale

    def budget(self, adapter: str) -> Tensor:
        """Return the weights w_i of Eq. 6, (k,), for the gains' parameter: times σ² where it is relative."""
        self.ensure_factors(adapter)
        sigma, weights = self.hiplora_sigma[adapter], self._budget.get(adapter)
        if weights is None or weights.device != sigma.device:
            weights, scale = budget_weights(sigma, self.configs[adapter].stability_gamma), self.gain_scale(adapter)
            weights = self._budget[adapter] = weights if scale is None else weights * scale**2
        return weights

    def stability_penalty(self, adapter: str) -> Tensor:
        """Return R(δ) of Eq. 6, differentiable; the adapter has a principal channel."""
        weights = self.budget(adapter)
        return penalty(self.hiplora_delta.whole(adapter).to(weights.dtype), weights)

    def mark_hooked(self, adapter: str) -> None:
        """Note that the optimizer hooks see the steps of an adapter's gains."""
        self._hooked.add(adapter)
        self._watches.pop(adapter, None)

    def _check_hooked(self, adapter: str) -> None:
        """Raise AdapterError if the gains need the optimizer hooks, and steps that these did not see trained them."""
        if observed() or adapter not in self.hiplora_delta or adapter in self._hooked:  # compiled: no guard on a set
            return
        config, delta = self.configs[adapter], self.hiplora_delta.parameter(adapter)
        needs_hooks = config.gain_lr_ratio != 1 or (config.stability_mode != "none" and config.stability_weight > 0)
        # Under torch.func.functional_call, another tensor stands in for the parameter.
        is_whole = isinstance(delta, nn.Parameter) and not is_sharded(delta)
        if not needs_hooks or not is_whole or not self._trains(delta):
            return
        if adapter not in self._watches:
            self._watches[adapter] = Watch(delta)
        elif self._watches[adapter].finds_training(delta):
            raise AdapterError(
                f"layer {self.name}: the gains of adapter '{adapter}' were trained by an optimizer whose parameters "
                "are not the model's (flat or master copies), so neither stability_weight nor gain_lr_ratio can act; "
                "pass the model's own parameters to a torch.optim.Optimizer, or set stability_mode='none' and "
                "gain_lr_ratio=1, and add λ * hiplora.stability_penalty(model) to the loss"
            )

    def lora_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return the whole update as (A', B'), (r + k, n) and (m, r + k), fp32 at least, with ΔW = B'A' exactly."""
        A, B, U, V = self._residual(adapter)
        with full_precision(A.device):  # a merge inside autocast is as exact as any
            A, B = self.retracted(adapter, A, B) if adapter in self._unretracted else self._softened(adapter, A, B)
            if (delta := self.gains(adapter)) is None:
                return A, self.scaling[adapter] * B
            return fused_factors(A, B, delta.to(A.dtype), U, V, self.scaling[adapter])

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return ΔW in the base layer's layout, fp32 at least."""
        A, B = self.lora_factors(adapter)
        with full_precision(A.device):
            return (B @ A).T if self.transposed else B @ A

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:  # noqa: D102 - PEFT asks
        return True

    def forward(
        self, x: Tensor | None = None, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> Tensor:
        """Return the base layer's output plus both channels of every active adapter, or of each row's own."""
        if x is None:  # as some models call an nn.Linear
            x = kwargs.pop("input")
        if self._disable_adapters and self.merged:
            self.unmerge()
        if adapter_names is not None and len(x) != len(adapter_names):
            raise AdapterError(
                f"layer {self.name}: Length of `adapter_names` should be the number of inputs, {len(x)}, and is "
                f"{len(adapter_names)}"
            )
        if self._disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        adapters = [name for name in dict.fromkeys(adapter_names or self.active_adapters) if name in self.hiplora_A]
        for adapter in adapters:
            self.ensure_factors(adapter)
            self._check_hooked(adapter)
        result = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for adapter in adapters:
            if adapter_names is None:
                result = self._add_channels(adapter, result, x)
            else:
                rows = torch.tensor([i for i, name in enumerate(adapter_names) if name == adapter], device=x.device)
                result = result.index_copy(0, rows, self._add_channels(adapter, result[rows], x[rows]))
        return result

    def _add_channels(self, adapter: str, result: Tensor, x: Tensor) -> Tensor:
        return add_channels(
            result,
            x,
            *self._softened(adapter, self.hiplora_A.acting(adapter), self.hiplora_B.acting(adapter)),
            self.gains(adapter),
            self.hiplora_U[adapter],
            self.hiplora_V[adapter],
            self.scaling[adapter],
            float(self.hiplora_dropout[adapter].p) if self.training else 0.0,  # type: ignore[arg-type]
            self._projected_sides(adapter),
            self.configs[adapter].gradient_projection,
        )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace the base weight by W + ΔW until `unmerge`; with `safe_merge`, AdapterError if it is not finite."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.hiplora_A]
        if not names:
            return
        weight = frozen_weight(self).T if self.transposed else frozen_weight(self)
        upcast = weight.to(torch.promote_types(weight.dtype, torch.float32))
        merged = sum((self.get_delta_weight(name) for name in names), upcast).to(weight.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise AdapterError(f"layer {self.name}: merging {names} gives a weight with NaN or Inf; nothing is merged")
        layer, quantised = self.get_base_layer(), self.quantization_backend is not None
        self._frozen = self._frozen or [layer if quantised else layer.weight]
        if quantised:
            # The backends alter the layer, its weight or its state: they get a copy, and `unmerge` restores the layer.
            self.base_layer = copy.deepcopy(self._frozen[0])
            self.set_base_weight(merged)
        else:
            # A new parameter, so that a weight tied to the embeddings is untied rather than overwritten.
            layer.weight = nn.Parameter(merged, requires_grad=False)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the frozen weight back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        layer: Any = self.get_base_layer()
        frozen = self._frozen.pop()
        if self.quantization_backend is not None:
            self.base_layer = frozen
        else:
            frozen.data = frozen.data.to(layer.weight)  # the model may have been moved, or cast, since
            layer.weight = frozen
        self.merged_adapters.clear()
