"""What one adapter adds to one module: the currency of the merge rules."""

from dataclasses import dataclass

from hiplora.export.adapter import Channels, Pair


@dataclass(frozen=True, eq=False)
class Term:
    """One adapter's update of one module, `weight · B'A'`.

    A' (q, n) and B' (m, q) in fp32; `channels` keeps the two channels of a HiP-LoRA module apart.
    """

    factors: Pair
    weight: float = 1.0
    channels: Channels | None = None
