"""An adapter as what it does to the base weights: one pair of thin factors a module, scaling included."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hiplora.errors import AdapterError, ConfigError
from hiplora.spectral import full_precision, fused_factors, leak, protected

Pair = tuple[Float[Tensor, "q n"], Float[Tensor, "m q"]]
# What of an adapter's configuration a stock one has too, and what an update made of it keeps.
CARRIED = ("modules_to_save", "task_type", "revision", "auto_mapping")
KEPT = (*CARRIED, "base_precision", "fan_in_fan_out")


@dataclass(frozen=True, eq=False)
class Channels:
    """The two channels of one HiP-LoRA module, in fp32; `delta` is None without gains.

    `leak_limit` is how far rounding may take A and B out of the complement of U and V, None where none is promised;
    `sides` says on which sides it is: "both", "input" or "output".
    """

    A: Float[Tensor, "r n"]
    B: Float[Tensor, "m r"]
    U: Float[Tensor, "m k"]
    sigma: Float[Tensor, " k"]
    V: Float[Tensor, "n k"]
    delta: Float[Tensor, " k"] | None
    scaling: float
    leak_limit: float | None = None
    sides: str = "both"

    def factors(self) -> Pair:
        """Return `(A', B')` with `B'A' = ΔW`, of rank r + k; of rank r without gains."""
        if self.delta is None:
            return self.A, self.scaling * self.B
        return fused_factors(self.A, self.B, self.delta, self.U, self.V, self.scaling)

    def scaled(self, scale: float) -> "Channels":
        """Return the channels of `scale` times the update."""
        delta = None if self.delta is None else scale * self.delta
        return replace(self, delta=delta, scaling=scale * self.scaling)

    def leak(self) -> float:
        """Return how far A and B lie outside the complement, 0 to 1 (relative Frobenius norms)."""
        return leak(self.A, self.B, *protected(self.U, self.V, self.sides))


@dataclass(frozen=True, eq=False)
class AdapterUpdate:
    """What an adapter adds to its base model, independent of the method that trained it.

    `factors[module]` is `(A', B')` of shapes (q, n) and (m, q) in fp32 with `ΔW = B'A'`: m outputs, n inputs, whatever
    the layout of the base weight. `kind` is "hiplora", "lora", "adalora", "osf", "merged" or "projected"; `config` is
    the adapter's own; `fingerprints` name the base weights where it recorded them; `extras` are the tensors of
    `modules_to_save` by parameter name; `channels` keeps HiP-LoRA modules apart; `source` is for messages; `errors`
    has ‖ΔW − ΔW_full‖/‖ΔW_full‖ (Frobenius) of modules that a merge cut down to a lower rank.
    """

    base: str
    kind: str
    config: Mapping[str, Any]
    factors: Mapping[str, Pair]
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    channels: Mapping[str, Channels] = field(default_factory=dict)
    source: str = "adapter"
    errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the adapted modules."""
        return tuple(self.factors)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank q of every module."""
        return {module: A.shape[0] for module, (A, _) in self.factors.items()}

    def shape(self, module: str) -> tuple[int, int]:
        """Return (m, n) of a module's update: outputs, inputs."""
        A, B = self.factors[module]
        return B.shape[0], A.shape[1]

    def delta(self, module: str) -> Float[Tensor, "m n"]:
        """Compute ΔW = B'A' of a module in fp32."""
        A, B = self.factors[module]
        with full_precision(A.device):
            return B @ A

    def scaled(self, scale: float) -> "AdapterUpdate":
        """Return the update times a number above 0; AdapterError if it replaces whole modules, which have no scale."""
        if not 0 < scale < math.inf:
            raise ConfigError(f"scale is {scale}; expected a number above 0")
        if scale == 1:
            return self
        self.refuse_extras("scaled; leave out --scale")
        factors = {module: (A, scale * B) for module, (A, B) in self.factors.items()}
        channels = {module: channels.scaled(scale) for module, channels in self.channels.items()}
        return replace(self, factors=factors, channels=channels)

    def renamed(self, prefix: str) -> "AdapterUpdate":
        """Return the update with `prefix` in place of the leading "model" of every module's and parameter's name.

        ConfigError if no module's name begins with it.
        """
        if not any(name.startswith("model.") for name in self.factors):
            raise ConfigError(
                f"prefix {prefix!r} takes the place of a leading 'model', and no adapted module has one, such as "
                f"{next(iter(self.factors))}; leave it out"
            )
        moved: dict[str, Any] = {
            part: {re.sub(r"^model(?=\.)", prefix, name): value for name, value in getattr(self, part).items()}
            for part in ("factors", "channels", "extras")
        }
        return replace(self, fingerprints={}, **moved)

    def refuse_extras(self, what: str) -> None:
        """Raise AdapterError if the update replaces whole modules, which cannot be `what`, with the way out."""
        if self.extras:
            raise AdapterError(
                f"{self.source}: replaces whole modules ({', '.join(sorted(self.extras))}), which cannot be {what}"
            )

    def check_low_rank(self) -> None:
        """Raise AdapterError if the update is of full rank, and so has no thin factors."""
        if not self.factors:
            raise AdapterError(
                f"{self.source}: the update is of full rank, which no LoRA adapter holds; cut it down with "
                "merge(..., rank=...), or write a model with hiplora.adapters.save_dense"
            )

    def check_leak(self) -> None:
        """Raise AdapterError if a HiP-LoRA adapter's residual channel is outside the complement that it promises."""
        for module, channels in self.channels.items():
            if channels.leak_limit is not None and not channels.leak() <= channels.leak_limit:
                raise AdapterError(
                    f"{self.source}: layer {module} leaks {channels.leak():.2e} into the protected subspace (limit "
                    f"{channels.leak_limit:.0e}): the complement was never enforced; load it as a model, call "
                    "hiplora.retract_(model), evaluate it again and save it"
                )


def balanced(U: Float[Tensor, "m q"], sigma: Float[Tensor, " q"], V: Float[Tensor, "n q"]) -> Pair:
    """Return fp32 factors of `U diag(σ) Vᵀ`, σ of any sign, that are equally large; of rank 1 where q is 0."""
    if not len(sigma):
        return zero_pair(U.shape[0], V.shape[0])
    root = sigma.abs().sqrt()
    return (V * root).T.float().contiguous(), (U * (root * sigma.sign())).float()


def zero_pair(m: int, n: int) -> Pair:
    """Return factors of rank 1 of the zero update (m, n)."""
    return torch.zeros(1, n), torch.zeros(m, 1)


def product_norm(P: Float[Tensor, "m q"], Q: Float[Tensor, "q n"]) -> float:
    """Return ‖PQ‖_F from triangular factors in float64, accurate even where columns of `P` nearly cancel."""
    R_P = torch.linalg.qr(P.double(), mode="r").R
    R_Q = torch.linalg.qr(Q.double().T, mode="r").R
    return torch.linalg.vector_norm(R_P @ R_Q.T).item()


def module_place(module: str) -> dict[str, Any]:
    """Return a module's name, its layer's index (None outside the layers) and its type, the name's last part."""
    layer = re.search(r"\.(\d+)\.", f".{module}.")
    return {"module": module, "layer": int(layer[1]) if layer else None, "type": module.rpartition(".")[2]}


def model_order(module: str) -> list[str | int]:
    """Sort key of module names that puts layer 10 after layer 9."""
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"(\d+)", module))]
