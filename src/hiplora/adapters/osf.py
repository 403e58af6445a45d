"""OSF adapters as plain updates: the trained part of each weight less the part that it replaces."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hiplora.adapters.adapter import AdapterUpdate, Pair
from hiplora.adapters.base_weights import BaseWeights
from hiplora.adapters.stock import check_extras, sort_tensors
from hiplora.errors import AdapterError
from hiplora.spectral.precision import full_precision

_FACTOR = re.compile(r"^(?P<module>.+)\.osf_svd_params\.(?P<part>[USV]_low)$")
_Low = tuple[Tensor, Tensor, Tensor]  # U (m, q), S (q,), V (q, n)


def osf_update(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str, base: str
) -> AdapterUpdate:
    """Return a saved OSF adapter as an update.

    The adapter holds what the q smallest singular triplets of each weight became; what they were is computed from the
    base weights as they are on the disk, as PEFT computes it when it loads the adapter. The factors have rank 2q.

    Args:
        config: as in `adapter_config.json`.
        tensors: by name, without PEFT's prefix.
        source: what to call the adapter in messages.
        base: name of the base model, whose adapted weights are read and decomposed in full.

    Raises:
        AdapterError: a tensor is missing or misshapen, or the base model cannot be read or has other layers.
    """
    weights = BaseWeights(base)

    def before(module: str, q: int) -> _Low:
        U, S, Vh = torch.linalg.svd(weights.weight(module).float(), full_matrices=False)
        k = len(S) - q
        return U[:, k:], S[k:], Vh[k:]

    return _update(config, tensors, source, base, before)


def live_osf_update(
    model: nn.Module,
    adapter: str,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    source: str,
    base: str,
) -> AdapterUpdate:
    """Return a live model's OSF adapter as an update; what its parts were is in its layers."""

    def before(module: str, q: int) -> _Low:
        layer: Any = model.get_submodule(f"base_model.model.{module}")
        U, S, V = (getattr(layer, f"_osf_{part}_low_init")[adapter].float().cpu() for part in "USV")
        return U, S, V

    return _update(config, state, source, base, before)


def _update(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    source: str,
    base: str,
    before: Callable[[str, int], _Low],
) -> AdapterUpdate:
    found, extras = sort_tensors(tensors, _FACTOR)
    check_extras(extras, config, source)
    factors = {module: _pair(module, parts, source, before) for module, parts in sorted(found.items())}
    if not factors:
        raise AdapterError(f"{source}: no U_low, S_low and V_low tensors in it; nothing was adapted or saved")
    return AdapterUpdate(base, "osf", dict(config), factors, {}, extras, {}, source)


def _pair(module: str, parts: Mapping[str, Tensor], source: str, before: Callable[[str, int], _Low]) -> Pair:
    for part in ("U_low", "S_low", "V_low"):
        if part not in parts:
            raise AdapterError(
                f"{source}: tensor {module}.osf_svd_params.{part} is missing; the adapter was not saved completely"
            )
    U, S, V = (parts[f"{part}_low"].float() for part in "USV")
    if U.dim() != 2 or V.dim() != 2 or not U.shape[1] == V.shape[0] == len(S) <= min(len(U), V.shape[1]):
        raise AdapterError(
            f"{source}: layer {module}: U_low {tuple(U.shape)}, S_low {tuple(S.shape)} and V_low {tuple(V.shape)} "
            "are no part of a weight; the file is damaged"
        )
    U0, S0, V0 = before(module, len(S))
    if U0.shape != U.shape or V0.shape != V.shape:
        raise AdapterError(
            f"{source}: layer {module}: the adapter is for a weight ({len(U)}, {V.shape[1]}), and the base model's is "
            f"({len(U0)}, {V0.shape[1]}); pass the right one as base=… (--base)"
        )
    with full_precision(U.device):
        return torch.cat([V, V0]), torch.cat([U * S, -(U0 * S0)], dim=1)
