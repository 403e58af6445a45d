"""The tensors of a layer's adapters: frozen factors, fp32 and shared where equal, and parameters named as in LoRA."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from hiplora.errors import AdapterError
from hiplora.spectral import SpectralFactors
from hiplora.tuner.config import HipLoraConfig

FACTOR_NAMES = ("hiplora_U", "hiplora_sigma", "hiplora_V")
_ALL = (*FACTOR_NAMES, "hiplora_shrink_U", "hiplora_shrink_V")


def factor_names(config: HipLoraConfig) -> list[str]:
    """Return the buffers that an adapter has: the factors, and a soft projection's filters of the protected sides."""
    names = list(FACTOR_NAMES)
    if config.projection == "soft":
        names += ["hiplora_shrink_U"] if config.basis_sides != "input" else []
        names += ["hiplora_shrink_V"] if config.basis_sides != "output" else []
    return names


def is_flat(parameter: Tensor) -> bool:
    """Whether a parameter is a piece of one of FSDP1's flat parameters."""
    return getattr(parameter, "_fsdp_flattened", False)


def is_sharded(parameter: Tensor) -> bool:
    """Whether this process has only a part of a parameter (FSDP, tensor parallelism)."""
    return hasattr(parameter, "device_mesh") or is_flat(parameter)


def own_part(value: Tensor, parameter: Tensor) -> Tensor:
    """Return this process's part of a value of a parameter's whole size; one that is flat must be a vector (k,)."""
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(parameter, DTensor)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    if not is_sharded(parameter):
        return value
    if not hasattr(parameter, "hiplora_start"):  # FSDP1 says nowhere which part it is, but parts are in order of rank
        sizes = torch.zeros(dist.get_world_size(), dtype=torch.long, device=parameter.device)
        sizes[dist.get_rank()] = parameter.numel()
        dist.all_reduce(sizes)
        parameter.hiplora_start = int(sizes[: dist.get_rank()].sum())  # type: ignore[attr-defined]
    part = value[parameter.hiplora_start :][: parameter.numel()]  # type: ignore[attr-defined]
    return nn.functional.pad(part, (0, parameter.numel() - len(part)))


class FactorBuffers(nn.Module):
    """Holds U (m, k), σ (k,) and V (n, k) per adapter as buffers; the base class of an adapted layer.

    Adapters with a soft projection have shrink_U and shrink_V (k, k) too.
    """

    live: ClassVar[weakref.WeakSet[Any]] = weakref.WeakSet()  # all layers, copies too: the optimizer hooks look here

    hiplora_U: BufferDict
    hiplora_sigma: BufferDict
    hiplora_V: BufferDict
    hiplora_shrink_U: BufferDict
    hiplora_shrink_V: BufferDict

    def __init__(self) -> None:
        super().__init__()
        self.pending: set[str] = set()  # adapters whose factors are to come from a file
        for name in _ALL:
            setattr(self, name, BufferDict(persistent=True))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take part in the hooks as a deep copy or out of a pickle too."""
        super().__setstate__(state)
        self.live.add(self)

    def set_factors(self, adapter: str, config: HipLoraConfig, factors: SpectralFactors) -> None:
        """Register computed factors; those that another adapter already has are shared with it."""
        self.live.add(self)
        for name in factor_names(config):
            getattr(self, name)[adapter] = getattr(factors, name.removeprefix("hiplora_"))
        self._share(adapter)

    def expect_factors(self, adapter: str, config: HipLoraConfig, shape: tuple[int, int], k: int) -> None:
        """Make room, filled with NaN, for factors about to be loaded into a layer of `shape` (m, n)."""
        sizes = {"hiplora_U": (shape[0], k), "hiplora_sigma": (k,), "hiplora_V": (shape[1], k)}
        self.live.add(self)
        self.pending.add(adapter)
        for name in factor_names(config):
            getattr(self, name)[adapter] = torch.full(sizes.get(name, (k, k)), math.nan)

    def load_factors(self, adapter: str, tensors: Mapping[str, Tensor]) -> None:
        """Take an adapter's factors from a file: as buffers of its own, or another adapter's where they are equal."""
        for name in set(_ALL) & tensors.keys():
            buffers = getattr(self, name)
            buffers[adapter] = tensors[name].to(buffers[adapter].device, torch.float32)
        self.pending.discard(adapter)
        self._share(adapter)

    def has_factors(self, adapter: str) -> bool:
        """Whether the factors are in the layer, although nothing said so: transformers writes them into it."""
        return adapter not in self.pending or not self.hiplora_sigma[adapter].isnan().any()

    def spectral_factors(self, adapter: str, config: HipLoraConfig, fingerprint: str) -> SpectralFactors:
        """Return an adapter's factors, to be shared with another of the same basis."""
        basis = "weight" if config.basis == "weight" else f"activation:{config.basis_sides}"
        held: dict[str, Any] = {
            name.removeprefix("hiplora_"): getattr(self, name)[adapter] for name in factor_names(config)
        }
        return SpectralFactors(
            **held, residual=0.0, orthogonality=0.0, method="shared", basis=basis, fingerprint=fingerprint
        )

    def factors_of(self, adapter: str) -> list[Any]:
        """Return the dictionaries of buffers in which an adapter has an entry."""
        return [buffers for name in _ALL if adapter in (buffers := getattr(self, name))]

    def _share(self, adapter: str) -> None:
        for buffers in self.factors_of(adapter):
            own = buffers[adapter]
            for key, other in buffers.items():
                if key != adapter and other.device == own.device and torch.equal(other, own):
                    buffers[adapter] = other
                    break

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move with the model, but keep the factors in fp32 and shared: their certificate holds for fp32."""
        before = {(name, adapter): b for name in _ALL for adapter, b in getattr(self, name).items()}
        super()._apply(fn, recurse)
        moved: dict[int, Tensor] = {}
        for (name, adapter), old in before.items():
            new = getattr(self, name)[adapter]
            if new.dtype != torch.float32:
                new = old.to(new.device)
            getattr(self, name)[adapter] = moved.setdefault(id(old), new)
        return self


class _Held(nn.Module):
    """Holds one parameter, `weight`; called only where FSDP wraps it, whose parameters are whole within a call."""

    weight: nn.Parameter

    def forward(self) -> Tensor:
        return self.weight.clone()


class FactorDict(nn.ModuleDict):
    """Adapter → parameter, registered as `<adapter>.weight` as in LoRA: TRL copies what has `.default.` in its name.

    Indexing gives the parameter; `items` and `values` give the modules that hold them, which PEFT asks about.
    """

    def __getitem__(self, adapter: str) -> nn.Parameter:  # type: ignore[override]
        return self._modules[adapter].weight  # type: ignore[union-attr,return-value]

    def __setitem__(self, adapter: str, value: Tensor) -> None:  # type: ignore[override]
        if adapter not in self:
            self.add_module(adapter, _Held())
        held = self._modules[adapter]
        trains = getattr(held, "weight", value).requires_grad
        held.weight = value if isinstance(value, nn.Parameter) else nn.Parameter(value, trains)  # type: ignore[union-attr]

    def parameter(self, adapter: str) -> nn.Parameter:
        """Return what an optimizer holds of an adapter's parameter: all of it, or this process's shard."""
        return next(self._modules[adapter].parameters())  # type: ignore[union-attr]

    def whole(self, adapter: str) -> Tensor:
        """Return an adapter's parameter, gathered by all processes where they share it.

        Raises:
            AdapterError: FSDP1 shards it, and gathers nothing outside a pass.
        """
        parameter: Any = self.parameter(adapter)
        if hasattr(parameter, "full_tensor"):
            return parameter.full_tensor()
        if is_flat(parameter):
            raise AdapterError(
                f"adapter '{adapter}': FSDP shards its parameters, so they cannot be read here; save it with "
                "save_pretrained(folder, state_dict=…) from the gathered state dict, and load the folder"
            )
        return parameter

    def acting(self, adapter: str) -> Tensor:
        """Return an adapter's parameter for a forward pass."""
        held: Any = self._modules[adapter]
        return held.weight if isinstance(held, _Held) else held()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for adapter in self:  # names of 0.1
            if f"{prefix}{adapter}" in state_dict:
                state_dict[f"{prefix}{adapter}.weight"] = state_dict.pop(f"{prefix}{adapter}")
        super()._load_from_state_dict(state_dict, prefix, *args)
