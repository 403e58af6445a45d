"""The tensors of a layer's adapters: how a layer holds them, whether they fit the base model, and what is saved."""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Callable, Container, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from hiplora.errors import AdapterError
from hiplora.spectral import (
    SpectralFactors,
    factor_mismatch,
    full_precision,
    leak,
    protected,
    weight_fingerprint,
    weight_sample,
)
from hiplora.tuner.config import HipLoraConfig
from hiplora.tuner.experts import unrolled
from hiplora.tuner.functional import retracted
from hiplora.tuner.targets import check_unmerged, frozen_weight, precision

if TYPE_CHECKING:
    from hiplora.tuner.layer import HipLoraLinear

FACTOR_NAMES = ("hiplora_U", "hiplora_sigma", "hiplora_V")
_BUFFER_NAMES = (*FACTOR_NAMES, "hiplora_shrink_U", "hiplora_shrink_V")
ORTHOGONALITY_LIMIT = 1e-3


def other_precision_limit(*precisions: str) -> float:
    """Return how far a weight's factors may move, in units of σ_1, from one of these precisions to another.

    8 and 16 bits move them by less than 1 %, 4 bits by a few per cent, 20 % where few inputs lead; another weight by
    about 100 %.
    """
    return 0.5 if any("4bit" in precision for precision in precisions) else 0.1


def leak_limit(dtype: torch.dtype) -> float:
    """Return the largest leak that rounding explains: about 1e-6 in fp32, 4e-3 in half; a step leaves 0.1 or more."""
    return 1e-4 if dtype in (torch.float32, torch.float64) else 2e-2


def factor_names(config: HipLoraConfig) -> list[str]:
    """Return the names of an adapter's buffers: the factors, and a soft projection's filters of the protected sides."""
    filters = {"hiplora_shrink_U": "output", "hiplora_shrink_V": "input"} if config.projection == "soft" else {}
    return [*FACTOR_NAMES, *(name for name, side in filters.items() if config.basis_sides in ("both", side))]


def factor_tensors(config: HipLoraConfig, factors: SpectralFactors) -> dict[str, Tensor]:
    """Return factors by the names of an adapter's buffers."""
    return {name: getattr(factors, name.removeprefix("hiplora_")) for name in factor_names(config)}


def plain_name(name: str) -> str:
    """Return a tensor's name without PEFT's prefix, and without those of torch.compile, FSDP, checkpointing and DDP.

    A state dict that was saved without PEFT has the adapter's name too: `lora_A.default.weight`, `hiplora_U.default`.
    """
    name = re.sub(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)", "", name).lstrip(".")
    name = name.removeprefix("module.").removeprefix("base_model.model.").removeprefix("module.")
    name = re.sub(r"\.((?:lora|hiplora)_\w+)\.(?!weight$)[^.]+(\.weight)?$", r".\1\2", name)
    return re.sub(r"\.osf_svd_params\.[^.]+(?=\.[USV]_low$)", ".osf_svd_params", name)


def file_names(tensors: Mapping[str, Tensor], layers: Container[str] = ()) -> dict[str, Tensor]:
    """Return an adapter file's tensors under today's names; 0.1 wrote `hiplora_A` for `hiplora_A.weight`."""
    named: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = re.sub(r"\.hiplora_(A|B|delta)$", r"\g<0>.weight", plain_name(key))
        name = f"module.{name}" if layer_of(f"module.{name}") in layers else name  # the model's own `module`
        named[f"base_model.model.{name}"] = value
    return named


def layer_of(key: str) -> str:
    """Return the layer that a tensor of an adapter belongs to; for any other tensor, a name that no layer has."""
    return key.removeprefix("base_model.model.").partition(".hiplora_")[0]


def is_flat(parameter: Tensor) -> bool:
    """Whether a parameter is a piece of one of FSDP1's flat parameters."""
    return getattr(parameter, "_fsdp_flattened", False)


def is_sharded(parameter: Tensor) -> bool:
    """Whether this process has only a part of a parameter (FSDP, tensor parallelism)."""
    return hasattr(parameter, "device_mesh") or is_flat(parameter)


def own_part(value: Tensor, parameter: Any) -> Tensor:
    """Return this process's part of a value with a parameter's whole size; of a flat parameter, a vector (k,)."""
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    if not is_flat(parameter):
        return value
    if not hasattr(parameter, "hiplora_start"):  # FSDP1 says nowhere which part it is, but parts are in order of rank
        sizes = torch.zeros(dist.get_world_size(), dtype=torch.long, device=parameter.device)
        sizes[dist.get_rank()] = parameter.numel()
        dist.all_reduce(sizes)
        parameter.hiplora_start = int(sizes[: dist.get_rank()].sum())
    part = value[parameter.hiplora_start :][: parameter.numel()]
    return nn.functional.pad(part, (0, parameter.numel() - len(part)))


class Watch:
    """Detects gains that are trained by steps that the optimizer hooks do not see.

    Such gains move after a backward pass and a step of other tensors (flat or master copies), or twice without any
    step. A single move without a step is SAM's, or a user's.
    """

    steps_of_others: ClassVar[int] = 0

    def __init__(self, gains: Tensor) -> None:
        self.moves = 0
        self._record(gains)
        gains.register_hook(self._on_gradient)

    def _record(self, gains: Tensor) -> None:
        self.gains, self.steps, self.differentiated = gains.detach().clone(), Watch.steps_of_others, False

    def _on_gradient(self, gradient: Tensor) -> None:
        self.differentiated = True

    def finds_training(self, gains: Tensor) -> bool:
        """Compare the gains with those of the last training pass."""
        if torch.equal(self.gains, gains):
            return False
        self.moves += self.differentiated
        is_training = self.differentiated and (self.moves > 1 or self.steps < Watch.steps_of_others)
        self._record(gains)
        return is_training


class FactorBuffers(nn.Module):
    """Holds U, σ, V and a soft projection's shrink_U, shrink_V per adapter as buffers; the base class of a layer."""

    live: ClassVar[weakref.WeakSet[Any]] = weakref.WeakSet()  # all layers, copies too: the optimizer hooks look here

    hiplora_U: BufferDict
    hiplora_sigma: BufferDict
    hiplora_V: BufferDict
    hiplora_shrink_U: BufferDict
    hiplora_shrink_V: BufferDict

    def __init__(self) -> None:
        super().__init__()
        self.pending: set[str] = set()  # adapters whose factors are to come from a file
        self._watches: dict[str, Watch] = {}  # on gains in training that no optimizer hook has seen
        for name in _BUFFER_NAMES:
            setattr(self, name, BufferDict(persistent=True))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Register a deep copy, or a layer out of a pickle, with the optimizer hooks."""
        super().__setstate__(state)
        self._watches = {}
        self.live.add(self)

    def place_factors(self, adapter: str, tensors: Mapping[str, Tensor]) -> None:
        """Register an adapter's buffers, or new values of them; equal ones of another adapter are shared."""
        for name, new in tensors.items():
            buffers = getattr(self, name)
            others = [buffer for key, buffer in buffers.items() if key != adapter and buffer.device == new.device]
            equal = (buffer for buffer in others if not new.is_meta and torch.equal(buffer, new))
            buffers[adapter] = next(equal, new)

    def has_factors(self, adapter: str) -> bool:
        """Whether the layer has the factors, also where transformers has written them into its buffers."""
        sigma = self.hiplora_sigma[adapter]
        return adapter not in self.pending or not (sigma.is_meta or sigma.isnan().any())

    def spectral_factors(self, adapter: str, config: HipLoraConfig, fingerprint: str) -> SpectralFactors:
        """Return an adapter's factors, to be shared with another of the same basis."""
        tensors = {name.removeprefix("hiplora_"): getattr(self, name)[adapter] for name in factor_names(config)}
        basis = "weight" if config.basis == "weight" else f"activation:{config.basis_sides}"
        return SpectralFactors(
            **tensors, residual=0.0, orthogonality=0.0, method="shared", basis=basis, fingerprint=fingerprint
        )

    def factors_of(self, adapter: str) -> dict[str, Any]:
        """Return the dictionaries of buffers in which an adapter has an entry, by name."""
        return {name: buffers for name in _BUFFER_NAMES if adapter in (buffers := getattr(self, name))}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move with the model, but keep the factors in fp32 and shared: their certificate holds for fp32."""
        before = {(name, adapter): b for name in _BUFFER_NAMES for adapter, b in getattr(self, name).items()}
        super()._apply(fn, recurse)
        moved: dict[int, Tensor] = {}
        for (name, adapter), old in before.items():
            new = getattr(self, name)[adapter]
            new = new if new.dtype == torch.float32 else old.to(new.device)
            getattr(self, name)[adapter] = moved.setdefault(id(old), new)
        return self


class _Holder(nn.Module):
    """Holds one parameter, `weight`; called only where FSDP or accelerate's offload provides it within a call."""

    weight: nn.Parameter

    def forward(self) -> Tensor:
        return self.weight.clone()


class FactorDict(nn.ModuleDict):
    """Adapter → parameter, registered as `<adapter>.weight` as in LoRA: TRL copies what has `.default.` in its name.

    Indexing gives the parameter; `items` and `values` give the modules that hold them, which PEFT asks about.
    """

    _modules: dict[str, Any]  # type: ignore[assignment]

    def __getitem__(self, adapter: str) -> nn.Parameter:  # type: ignore[override]
        return self._modules[adapter].weight

    def __setitem__(self, adapter: str, value: Tensor) -> None:  # type: ignore[override]
        if adapter not in self:
            self.add_module(adapter, _Holder())
        holder = self._modules[adapter]
        trains = getattr(holder, "weight", value).requires_grad
        holder.weight = value if isinstance(value, nn.Parameter) else nn.Parameter(value, trains)

    def parameter(self, adapter: str) -> nn.Parameter:
        """Return the part of an adapter's parameter that an optimizer has: all of it, or this process's shard."""
        holder = self._modules[adapter]
        return holder.weight if isinstance(holder, _Holder) else next(holder.parameters())

    def whole(self, adapter: str) -> Tensor:
        """Return an adapter's parameter, gathered where processes share it; AdapterError for FSDP1's."""
        parameter: Any = self.parameter(adapter)
        if is_flat(parameter):
            raise AdapterError(
                f"adapter '{adapter}': FSDP shards its parameters, so they cannot be read here; save it with "
                "save_pretrained(folder, state_dict=…) from the gathered state dict, and load the folder"
            )
        return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter

    def acting(self, adapter: str) -> Tensor:
        """Return an adapter's parameter for a forward pass."""
        holder = self._modules[adapter]
        return holder.weight if isinstance(holder, _Holder) and not holder.weight.is_meta else holder()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for adapter in self:  # names of 0.1
            if f"{prefix}{adapter}" in state_dict:
                state_dict[f"{prefix}{adapter}.weight"] = state_dict.pop(f"{prefix}{adapter}")
        super()._load_from_state_dict(state_dict, prefix, *args)


def note_leaks(layer: HipLoraLinear, _: Any) -> None:
    """Note adapters whose loaded factors are outside the complement: as in the saved model, they act projected."""
    for adapter in layer.hiplora_A.keys() - layer.pending:
        A = layer.hiplora_A.parameter(adapter)
        if not is_sharded(A) and not A.is_meta and layer.leak(adapter) > leak_limit(A.dtype):
            layer._unretracted.add(adapter)


def check_fingerprints(model: nn.Module, config: HipLoraConfig) -> None:
    """Compare the model's weights with those an adapter was made for; in another precision `check_checkpoint` decides.

    A sample of each weight's values is compared, or where the adapter has none (of 0.1) all of them.
    """
    config.unverified, wrong, samples = set(), [], config.weight_samples
    with unrolled(model):
        for name, expected in config.fingerprints.items():
            try:
                module = model.get_submodule(name)
                weight, stored = frozen_weight(module), precision(module)
            except AttributeError:
                raise AdapterError(
                    f"layer {name}: the adapter was made for it, but this base model has no such module; "
                    f"load it over {config.base_model_name_or_path or 'the model it was trained on'}"
                ) from None
            check_unmerged(module, name)
            fits = (
                weight_sample(weight, name) == samples[name]
                if name in samples
                else weight_fingerprint(weight, name) == expected
            )
            if not fits and (stored == config.base_precision or not config.save_factors):
                wrong.append(name)
            elif not fits:
                config.unverified.add(name)
    if wrong:
        raise other_weights(wrong, config)


def other_weights(names: list[str], config: HipLoraConfig) -> AdapterError:
    """Return the error that these layers' weights are not those that an adapter was made for."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    reason = "" if config.save_factors else " (saved without its factors, it needs the very same values)"
    trained_on = config.base_model_name_or_path if config.from_checkpoint else ""
    return AdapterError(
        f"layer {names[0]}{more}: the base model's weight is not the one that this adapter was made for{reason}; "
        f"load it over {trained_on or 'the model it was trained on'}"
    )


def check_checkpoint(
    layers: Mapping[str, HipLoraLinear], config: HipLoraConfig, adapter: str, state: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Check an adapter file against the layers that it is meant for; return each layer's tensors by kind.

    Raises:
        AdapterError: a tensor is missing, misshapen or not finite, the factors are not orthonormal, or they do
            not belong to the base model's weight.
    """
    factors = factor_names(config) if config.save_factors else []
    plain = {key.removeprefix("base_model.model.").removesuffix(".weight"): tensor for key, tensor in state.items()}
    checked: dict[str, dict[str, Tensor]] = {}
    for name, layer in layers.items():
        tensors = checked[name] = {}
        for kind in (*layer.parameters_of(adapter), *factors):
            if (tensor := plain.get(f"{name}.{kind}")) is None:
                raise AdapterError(f"layer {name}: the adapter file has no {kind}; it is damaged, fetch it again")
            tensors[kind] = tensor
            expected = getattr(layer, kind)[adapter].shape
            if tensor.shape != expected:
                raise AdapterError(
                    f"layer {name}: {kind} in the adapter file is {tuple(tensor.shape)}, expected {tuple(expected)}; "
                    "the file and adapter_config.json do not belong together"
                )
            if not torch.stack(torch.aminmax(tensor)).isfinite().all():
                raise AdapterError(f"layer {name}: {kind} in the adapter file has NaN or Inf; it is damaged")
        if "hiplora_U" in tensors:
            with full_precision(torch.device("cpu")):
                _check_factors(layer, config, adapter, *(tensors[kind].float().cpu() for kind in FACTOR_NAMES))
    if config.unverified:
        warnings.warn(
            f"the base model is stored in another precision than the adapter's ({config.base_precision}); the "
            "adapter's own factors were checked against it and are used",
            stacklevel=2,
        )
    return checked


def _check_factors(
    layer: HipLoraLinear, config: HipLoraConfig, adapter: str, U: Tensor, sigma: Tensor, V: Tensor
) -> None:
    for label, basis in (("U", U), ("V", V)):
        error = (basis.T @ basis - torch.eye(basis.shape[1])).abs().max().item()
        if not error <= ORTHOGONALITY_LIMIT:
            raise AdapterError(
                f"layer {layer.name}: the columns of {label} in the adapter file are not orthonormal "
                f"(error {error:.1e}, limit {ORTHOGONALITY_LIMIT:.0e}); the file is damaged, fetch it again"
            )
    # A file may bring factors of another base, or precision, into an adapter that was made here.
    foreign = not config.from_checkpoint and not torch.equal(U, layer.hiplora_U[adapter].cpu())
    if foreign or layer.name in config.unverified:
        mismatch = factor_mismatch(frozen_weight(layer).float().cpu(), U, sigma, V, config.basis)
        if not mismatch <= other_precision_limit(precision(layer), "4bit" if foreign else config.base_precision or ""):
            raise other_weights([layer.name], config)


def retracted_state(state: Mapping[str, Tensor], config: HipLoraConfig, adapter: str) -> dict[str, Tensor]:
    """Return the tensors to save of an adapter: A and B are projected where they left the complement.

    They leave it where the optimizer hooks did not see the optimizer, or could not retract its shards. AdapterError if
    a tensor is not finite.
    """
    state = {key: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for key, tensor in state.items()}
    for key, tensor in state.items():
        if ".hiplora_" in key and not torch.isfinite(tensor).all():
            raise AdapterError(
                f"{key.removeprefix('base_model.model.')}: has NaN or Inf, so the adapter is not saved: its training "
                "diverged; lower the learning rate and train again"
            )
    saved = dict(state)
    for key, A in state.items() if config.is_closed else ():
        module, is_A, suffix = key.partition(f".hiplora_A.{adapter}")
        if not is_A:
            continue
        key_B = f"{module}.hiplora_B.{adapter}{suffix}"
        B, U, V = state[key_B], *(state[f"{module}.hiplora_{side}.{adapter}"].float() for side in "UV")
        if not leak(A.float(), B.float(), *protected(U, V, config.basis_sides)) <= leak_limit(A.dtype):
            with full_precision(A.device):
                projected_A, projected_B = retracted(A, B, U, V, config.basis_sides)
            saved |= {key: projected_A.to(A.dtype), key_B: projected_B.to(B.dtype)}
    return saved
