"""A merge cut down to a rank: the best approximation of each module's update, and what it costs."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hiplora.adapters import AdapterUpdate, Channels, Pair, product_norm
from hiplora.merging.options import check_count
from hiplora.merging.thin import balanced, thin_svd
from hiplora.spectral import full_precision

_NO_WRAP: Callable[[Iterable[str]], Iterable[str]] = iter


@dataclass(frozen=True, eq=False)
class TruncatedUpdate(AdapterUpdate):
    """An update that was cut down to `cut_to`; `errors` is ‖ΔW − ΔW_full‖/‖ΔW_full‖ (Frobenius) per module."""

    cut_to: int = 0
    errors: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready record of the truncation, the module that lost most first."""
        worst = sorted(self.errors.items(), key=lambda item: -item[1])
        return {"rank": self.cut_to, "modules": [{"module": m, "relative_error": e} for m, e in worst]}


def truncate(
    update: AdapterUpdate,
    rank: int,
    *,
    keep_channels: bool = False,
    wrap: Callable[[Iterable[str]], Iterable[str]] = _NO_WRAP,
) -> TruncatedUpdate:
    """Cut every module of an update down to its `rank` strongest singular directions (Eckart and Young 1936).

    In factor space: QR of both thin factors, SVD of the small matrix between them. Modules of no higher rank are left
    as they are.

    Args:
        update: what is cut down; it is left as it is.
        rank: R, at least 1.
        keep_channels: where a module has its two channels apart, keep the gains and cut only the residual channel to
            `rank`; otherwise the whole update is cut, and the channels are lost.
        wrap: called with the module names, yields them; for a progress bar.

    Raises:
        ConfigError: rank below 1.
    """
    check_count("rank", rank, least=1)
    factors, channels, errors = dict(update.factors), dict(update.channels), {}
    with full_precision(torch.device("cpu")):
        for module in wrap(list(factors)):
            apart = channels.get(module) if keep_channels else None
            if apart is not None:
                channels[module], lost = _cut_residual(apart, rank)
                factors[module] = channels[module].factors()
            else:
                factors[module], lost = _cut(update.factors[module], rank)
                if lost is not None:
                    channels.pop(module, None)
            errors[module] = _share(lost, update.factors[module])
    fields = {name: getattr(update, name) for name in AdapterUpdate.__dataclass_fields__}
    return TruncatedUpdate(**fields | {"factors": factors, "channels": channels}, cut_to=rank, errors=errors)


def _cut(factors: Pair, rank: int) -> tuple[Pair, float | None]:
    """Return factors of at most this rank, and the norm of what was cut off; None if they are as they were."""
    if factors[0].shape[0] <= rank:
        return factors, None
    U, sigma, V = thin_svd(factors)
    return balanced(U[:, :rank], sigma[:rank], V[:, :rank]), sigma[rank:].norm().item()


def _cut_residual(channels: Channels, rank: int) -> tuple[Channels, float | None]:
    (A, B), lost = _cut((channels.A, channels.B), rank)
    return replace(channels, A=A, B=B), None if lost is None else abs(channels.scaling) * lost


def _share(lost: float | None, factors: Pair) -> float:
    if not lost:
        return 0.0
    A, B = factors
    return lost / product_norm(B, A)
