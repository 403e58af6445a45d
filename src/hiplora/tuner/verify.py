"""Does an adapter fit the base model in front of it? Checked by the values of the weights, before it is used."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hiplora.errors import AdapterError
from hiplora.spectral import factor_mismatch, full_precision, leak, protected, weight_fingerprint
from hiplora.tuner.buffers import FACTOR_NAMES, factor_names
from hiplora.tuner.config import HipLoraConfig
from hiplora.tuner.experts import unrolled
from hiplora.tuner.functional import retracted
from hiplora.tuner.targets import frozen_weight, precision

if TYPE_CHECKING:
    from hiplora.tuner.layer import HipLoraLinear

# A weight stored in another precision still carries the same triplets: 8 and 16 bits move them by less than 1 %
# of σ₁, 4 bits by a few per cent; another weight moves them by about 100 %.
OTHER_PRECISION_LIMIT = 0.1
ORTHOGONALITY_LIMIT = 1e-3


def leak_limit(dtype: torch.dtype) -> float:
    """Return the largest leak that rounding explains, for factors of a dtype.

    Rounding leaves about 1e-6 in fp32 and 4e-3 in half precision; an unretracted step leaves 0.1 or more.
    """
    return 1e-4 if dtype in (torch.float32, torch.float64) else 2e-2


def check_fingerprints(model: nn.Module, config: HipLoraConfig) -> None:
    """Compare every weight that the adapter was made for with the model's.

    A weight with other values is an error, unless it is stored in another precision than the adapter's base was:
    then the saved factors decide, once they are loaded (`check_checkpoint`).

    Raises:
        AdapterError: names the modules that are missing or differ.
    """
    config.unverified, wrong = set(), []
    with unrolled(model):
        for name, expected in config.fingerprints.items():
            try:
                module = model.get_submodule(name)
                found, stored = weight_fingerprint(frozen_weight(module)), precision(module)
            except AttributeError:
                raise AdapterError(
                    f"layer {name}: the adapter was made for it, but this base model has no such module; "
                    f"load it over {config.base_model_name_or_path or 'the model it was trained on'}"
                ) from None
            if getattr(module, "merged", False):
                raise AdapterError(f"layer {name}: another adapter is merged into it; call unmerge_adapter() first")
            if found != expected and (stored == config.base_precision or not config.save_factors):
                wrong.append(name)
            elif found != expected:
                config.unverified.add(name)
    if wrong:
        raise AdapterError(_other_weights(wrong, config))


def _other_weights(names: list[str], config: HipLoraConfig) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    why = "" if config.save_factors else " (saved without its factors, it needs the very same values)"
    return (
        f"layer {names[0]}{more}: the base model's weight is not the one that this adapter was made for{why}; "
        f"load it over {config.base_model_name_or_path or 'the model it was trained on'}"
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
        for kind in (*layer.held_by(adapter), *factors):
            found = plain.get(f"{name}.{kind}")
            if found is None:
                raise AdapterError(f"layer {name}: the adapter file has no {kind}; it is damaged, fetch it again")
            tensors[kind] = found
            wanted = getattr(layer, kind)[adapter].shape
            if found.shape != wanted:
                raise AdapterError(
                    f"layer {name}: {kind} in the adapter file is {tuple(found.shape)}, expected {tuple(wanted)}; "
                    "the file and adapter_config.json do not belong together"
                )
            if not torch.isfinite(found).all():
                raise AdapterError(f"layer {name}: {kind} in the adapter file has NaN or Inf; it is damaged")
        if "hiplora_U" in tensors:
            _check_factors(layer, config, *(tensors[kind].float().cpu() for kind in FACTOR_NAMES))
    if config.unverified:
        warnings.warn(
            f"the base model is stored in another precision than the adapter's ({config.base_precision}); the "
            "adapter's own factors were checked against it and are used",
            stacklevel=2,
        )
    return checked


def _check_factors(layer: HipLoraLinear, config: HipLoraConfig, U: Tensor, sigma: Tensor, V: Tensor) -> None:
    for label, basis in (("U", U), ("V", V)):
        error = (basis.T @ basis - torch.eye(basis.shape[1])).abs().max().item()
        if not error <= ORTHOGONALITY_LIMIT:
            raise AdapterError(
                f"layer {layer.name}: the columns of {label} in the adapter file are not orthonormal "
                f"(error {error:.1e}, limit {ORTHOGONALITY_LIMIT:.0e}); the file is damaged, fetch it again"
            )
    if layer.name in config.unverified:
        off = factor_mismatch(frozen_weight(layer).float().cpu(), U, sigma, V, config.basis)
        if not off <= OTHER_PRECISION_LIMIT:
            raise AdapterError(_other_weights([layer.name], config))


def retracted_state(state: Mapping[str, Tensor], config: HipLoraConfig, adapter: str) -> dict[str, Tensor]:
    """Return what is saved of an adapter: A and B as they act, projected where they left the complement.

    They do where the optimizer hooks did not see the optimizer, or could not retract its shards.

    Raises:
        AdapterError: a tensor is not finite; names it.
    """
    state = {key: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for key, tensor in state.items()}
    for key, tensor in state.items():
        if ".hiplora_" in key and not torch.isfinite(tensor).all():
            raise AdapterError(
                f"{key.removeprefix('base_model.model.')}: has NaN or Inf, so the adapter is not saved: its training "
                "diverged; lower the learning rate and train again"
            )
    kept = dict(state)
    for key, A in state.items() if config.is_closed else ():
        module, found, end = key.partition(f".hiplora_A.{adapter}")
        if not found:
            continue
        names = [f"{module}.hiplora_B.{adapter}{end}", *(f"{module}.hiplora_{one}.{adapter}" for one in "UV")]
        B, U, V = state[names[0]], *(state[name].float() for name in names[1:])
        if not leak(A.float(), B.float(), *protected(U, V, config.basis_sides)) <= leak_limit(A.dtype):
            with full_precision(A.device):
                found_A, found_B = retracted(A, B, U, V, config.basis_sides)
            kept |= {key: found_A.to(A.dtype), names[0]: found_B.to(B.dtype)}
    return kept
