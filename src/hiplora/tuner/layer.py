"""One adapted linear layer: LoRA's factors in the complement, gains on the protected directions."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hiplora.errors import AdapterError
from hiplora.spectral import (
    FactorStore,
    SpectralFactors,
    budget_weights,
    fused_factors,
    leak,
    penalty,
    protected,
    retract,
    soften,
)
from hiplora.tuner.buffers import FACTOR_NAMES, FactorBuffers
from hiplora.tuner.config import HipLoraConfig
from hiplora.tuner.functional import add_channels
from hiplora.tuner.targets import frozen_weight, linear_target


def leak_limit(dtype: torch.dtype) -> float:
    """Return the largest leak that rounding explains, for factors of a dtype.

    Rounding leaves about 1e-6 in fp32 and 4e-3 in half precision; an unretracted step leaves 0.1 or more.
    """
    return 1e-4 if dtype in (torch.float32, torch.float64) else 2e-2


def leak_error(layer: str, adapter: str, leak: float, limit: float) -> AdapterError:
    """Return the error for an adapter that left the complement."""
    return AdapterError(
        f"layer {layer}: adapter '{adapter}' leaks {leak:.2e} into the protected subspace (limit {limit:.0e}): its "
        "optimizer's steps were not followed by retraction; train with a torch.optim.Optimizer that holds the "
        "adapter's parameters, or call hiplora.retract_(model)"
    )


class HipLoraLinear(FactorBuffers, BaseTunerLayer):
    """HiP-LoRA around a frozen `nn.Linear`, `Conv1D` or quantised linear layer of shape (m, n) = (out, in).

    Per adapter: parameters `hiplora_A` (r, n), `hiplora_B` (m, r), `hiplora_delta` (k,), and frozen fp32 buffers
    `hiplora_U` (m, k), `hiplora_sigma` (k,), `hiplora_V` (n, k), shared between adapters where they are equal.
    """

    adapter_layer_names = ("hiplora_A", "hiplora_B", "hiplora_delta")
    other_param_names = ("r", "lora_alpha", "scaling", "hiplora_dropout", "configs", "_budget")

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.out_features, self.in_features = linear_target(base_layer, name).shape
        self.transposed = isinstance(self.get_base_layer(), Conv1D)
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer())
        self.hiplora_A = nn.ParameterDict()
        self.hiplora_B = nn.ParameterDict()
        self.hiplora_delta = nn.ParameterDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.hiplora_dropout: dict[str, float] = {}
        self.configs: dict[str, HipLoraConfig] = {}
        self._budget: dict[str, Tensor] = {}
        self._astray: set[str] = set()  # adapters that may have been trained since they were last retracted
        self._pending: set[str] = set()  # adapters whose factors are to come from a file
        # The base weight while merged; in a list, so as not to be registered as this layer's own.
        self._frozen: list[nn.Parameter] = []
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = []

    def frozen_weight(self) -> Tensor:
        """Return the frozen weight as (m, n), dequantised where needed."""
        return frozen_weight(self)

    def add_adapter(
        self,
        adapter: str,
        config: HipLoraConfig,
        r: int,
        alpha: float,
        k: int,
        factors: SpectralFactors | None,
    ) -> None:
        """Add an adapter of residual rank `r`, scale `alpha / r` and principal rank `k`.

        Without `factors` room is reserved for those of a file that is about to be loaded.
        """
        self.r[adapter], self.lora_alpha[adapter], self.scaling[adapter] = r, alpha, alpha / r
        self.hiplora_dropout[adapter] = config.lora_dropout
        self.configs[adapter] = config
        self.hiplora_A[adapter] = nn.Parameter(torch.empty(r, self.in_features))
        self.hiplora_B[adapter] = nn.Parameter(torch.zeros(self.out_features, r))
        if config.principal_channel:
            self.hiplora_delta[adapter] = nn.Parameter(torch.zeros(k))
        self._initialise(adapter, config.init_weights)
        if factors is None:
            self.expect_factors(adapter, config, (self.out_features, self.in_features), k)
            self._pending.add(adapter)
        else:
            self.set_factors(adapter, config, factors)
        self._move_adapter_to_device_of_base_layer(adapter)
        if factors is not None:
            self.retract_(adapter)

    def _initialise(self, adapter: str, how: bool | str) -> None:
        if how == "zero" and isinstance(how, str):
            nn.init.zeros_(self.hiplora_A[adapter])
            return
        nn.init.kaiming_uniform_(self.hiplora_A[adapter], a=math.sqrt(5))
        if how is False:
            nn.init.kaiming_uniform_(self.hiplora_B[adapter], a=math.sqrt(5))
            if adapter in self.hiplora_delta:
                nn.init.normal_(self.hiplora_delta[adapter], std=0.02)

    def load_factors(self, adapter: str, tensors: Mapping[str, Tensor]) -> None:
        """Take an adapter's factors from a file."""
        super().load_factors(adapter, tensors)
        self._pending.discard(adapter)
        self._budget.pop(adapter, None)

    @torch.no_grad()
    def ensure_factors(self, adapter: str) -> None:
        """Compute the factors that were to come from a file and did not: the adapter begins anew.

        Raises:
            AdapterError: they are of the activation basis, which needs a calibration.
        """
        if adapter not in self._pending:
            return
        config = self.configs[adapter]
        if config.basis != "weight":
            raise AdapterError(
                f"layer {self.name}: no factors were loaded for adapter '{adapter}'; load it with "
                "PeftModel.from_pretrained, or make a new configuration for a new adapter"
            )
        self._pending.remove(adapter)
        k = self.hiplora_sigma[adapter].shape[0]
        factors = FactorStore().get_or_compute(self.frozen_weight(), k, config.svd_tolerance, name=self.name)
        for name in FACTOR_NAMES:  # in place: a state dict may hold the buffer
            getattr(self, name)[adapter].copy_(getattr(factors, name.removeprefix("hiplora_")))
        self.retract_(adapter)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; another one becomes active if it was the active one (as in PEFT)."""
        BaseTunerLayer.delete_adapter(self, adapter_name)
        self.delete_factors(adapter_name)
        self._pending.discard(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Parameters follow the base layer's device and dtype (as in PEFT); factors its device only."""
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        base = self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        self.move_factors(adapter_name, device or base)

    @torch.no_grad()
    def retract_(self, adapter: str) -> None:
        """Project A and B onto the complement in place (Eq. 4); nothing where the projection is off or soft."""
        A, B = self.hiplora_A[adapter], self.hiplora_B[adapter]
        if not self.configs[adapter].is_closed or A.device.type == "meta":
            return
        self.ensure_factors(adapter)
        A_wide, B_wide, U, V = self._residual(adapter)
        sides = self.configs[adapter].basis_sides
        for kept, value in zip((A, B), retract(A_wide, B_wide, *protected(U, V, sides)), strict=True):
            kept.copy_(value)
        self._astray.discard(adapter)

    def leak(self, adapter: str) -> float:
        """Return the larger of ‖UᵀB‖/‖B‖ and ‖AV‖/‖A‖; 0 where the projection is off or soft."""
        if not self.configs[adapter].is_closed:
            return 0.0
        self.ensure_factors(adapter)
        A, B, U, V = self._residual(adapter)
        return leak(A, B, *protected(U, V, self.configs[adapter].basis_sides))

    def _projected_sides(self, adapter: str) -> str | None:
        """Return the sides on which a forward pass projects A and B; None where they are known to be retracted.

        A pass with gradients always projects: no optimizer can then train what the projection takes away, whether or
        not the hooks see its steps.
        """
        config = self.configs[adapter]
        if not config.is_closed:
            return None
        if torch.compiler.is_compiling():
            return config.basis_sides
        trains = self.hiplora_A[adapter].requires_grad or self.hiplora_B[adapter].requires_grad
        if trains and (self.training or torch.is_grad_enabled()):
            self._astray.add(adapter)
        return config.basis_sides if adapter in self._astray else None

    def _softened(self, adapter: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return A and B as they act: through the soft projection where there is one."""
        if self.configs[adapter].projection == "hard":
            return A, B
        U, V = self.hiplora_U[adapter], self.hiplora_V[adapter]
        filters = [dict(held.items()) for held in (self.hiplora_shrink_U, self.hiplora_shrink_V)]
        shrink_U, shrink_V = (held.get(adapter) for held in filters)
        soft_A, soft_B = soften(A.float(), B.float(), U, V, shrink_U, shrink_V)
        return soft_A.to(A.dtype), soft_B.to(B.dtype)

    def _residual(self, adapter: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (A, B, U, V) in one dtype, fp32 at least."""
        A, B = self.hiplora_A[adapter].detach(), self.hiplora_B[adapter].detach()
        dtype = torch.promote_types(A.dtype, torch.float32)
        U, V = self.hiplora_U[adapter], self.hiplora_V[adapter]
        return A.to(dtype), B.to(dtype), U.to(dtype), V.to(dtype)

    def check_leak(self, adapter: str) -> None:
        """Refuse an adapter that left the complement.

        Raises:
            AdapterError: the leak is beyond rounding: the optimizer's steps were not followed by retraction.
        """
        limit = leak_limit(self.hiplora_A[adapter].dtype)
        found = self.leak(adapter)
        if not found <= limit:
            raise leak_error(self.name, adapter, found, limit)

    def budget(self, adapter: str) -> Tensor:
        """Return the weights w_i of Eq. 6, (k,)."""
        self.ensure_factors(adapter)
        sigma = self.hiplora_sigma[adapter]
        weights = self._budget.get(adapter)
        if weights is None or weights.device != sigma.device:
            weights = self._budget[adapter] = budget_weights(sigma, self.configs[adapter].stability_gamma)
        return weights

    def stability_penalty(self, adapter: str) -> Tensor:
        """Return R(δ) of Eq. 6, differentiable; the adapter has a principal channel."""
        return penalty(self.hiplora_delta[adapter].float(), self.budget(adapter))

    def lora_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return the whole update as (A', B'), (r + k, n) and (m, r + k), fp32 at least, with ΔW = B'A' exactly."""
        self.ensure_factors(adapter)
        A, B, U, V = self._residual(adapter)
        A, B = self._softened(adapter, A, B)
        if adapter not in self.hiplora_delta:
            return A, self.scaling[adapter] * B
        delta = self.hiplora_delta[adapter].detach().to(A.dtype)
        return fused_factors(A, B, delta, U, V, self.scaling[adapter])

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return ΔW in the base layer's layout, fp32 at least."""
        A, B = self.lora_factors(adapter)
        return (B @ A).T if self.transposed else B @ A

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:  # noqa: D102 - PEFT asks
        return True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base layer's output plus both channels of every active adapter."""
        if self._disable_adapters and self.merged:
            self.unmerge()
        if self._disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        adapters = [adapter for adapter in self.active_adapters if adapter in self.hiplora_A]
        for adapter in adapters if self._pending else ():
            self.ensure_factors(adapter)
        result = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for adapter in adapters:
            result = add_channels(
                result,
                x,
                *self._softened(adapter, self.hiplora_A[adapter], self.hiplora_B[adapter]),
                self.hiplora_delta.get(adapter),
                self.hiplora_U[adapter],
                self.hiplora_V[adapter],
                self.scaling[adapter],
                self.hiplora_dropout[adapter] if self.training else 0.0,
                self._projected_sides(adapter),
                self.configs[adapter].gradient_projection,
            )
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace the base weight by W + ΔW; the frozen weight itself is kept and comes back with `unmerge`.

        Raises:
            AdapterError: an adapter leaks, or (with `safe_merge`) the merged weight would not be finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.hiplora_A]
        if not names:
            return
        for name in names:
            self.check_leak(name)
        weight = self.get_base_weight()
        merged = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for name in names:
            merged = merged + self.get_delta_weight(name)
        merged = merged.to(weight.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise AdapterError(f"layer {self.name}: merging {names} gives a weight with NaN or Inf; nothing is merged")
        layer: Any = self.get_base_layer()
        if not self._frozen:
            # A quantisation backend may alter the parameter that it replaces; then a copy is what comes back.
            self._frozen.append(copy.deepcopy(layer.weight) if self.quantization_backend else layer.weight)
        if self.quantization_backend is not None:
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
        weight = self._frozen.pop()
        if weight.device != layer.weight.device:
            weight.data = weight.data.to(layer.weight.device)
        layer.weight = weight
        self.merged_adapters.clear()

    def __repr__(self) -> str:
        return f"hiplora.{super().__repr__()}"
