"""What one adapter adds to one module: the currency of the merge rules."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from hiplora.adapters import Channels, Pair


@dataclass(frozen=True, eq=False)
class Term:
    """One adapter's update of one module, `weight · B'A'`.

    A' (q, n) and B' (m, q) in fp32; `channels` keeps the two channels of a HiP-LoRA module apart.
    """

    factors: Pair
    weight: float = 1.0
    channels: Channels | None = None


@dataclass(frozen=True, eq=False)
class DenseTerm:
    """One adapter's update of one module as a matrix, for the rules that look at entries.

    A rule may overwrite `delta` (m, n). `key` is the same for the same module and values, whatever the order of the
    adapters: rules that draw at random draw by it.
    """

    delta: Float[Tensor, "m n"]
    weight: float = 1.0
    key: str = ""
