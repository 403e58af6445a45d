"""The methods that are compared, with settings that give all the same chance."""

import re
from dataclasses import dataclass
from typing import Any

from hiplora.errors import ConfigError

LORA, HIPLORA, ACTIVATION = "LoRA", "HiP-LoRA", "HiP-LoRA (activation)"
METHODS = (LORA, HIPLORA, ACTIVATION)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Ranks:
    """Ranks of a comparison.

    HiP-LoRA trains r(m + n) + k scalars for an (m, n) weight, LoRA r(m + n), and so does HiP-LoRA without gains, as its
    function-aware preset is. Since k ≤ min(m, n) ≤ (m + n)/2, no other LoRA rank comes closer than the same r.
    """

    r: int = 16
    principal: int = 32
    alpha: int = 32
    dropout: float = 0.05

    def __post_init__(self) -> None:
        """Refuse ranks below 1."""
        for option, value in (("--rank", self.r), ("--principal-rank", self.principal)):
            if value < 1:
                raise ConfigError(f"{option} is {value}; expected at least 1")

    def settings(self, method: str) -> dict[str, Any]:
        """Return a method's settings under the names of recipes and of PEFT."""
        shared = {
            "r": self.r,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": list(TARGETS),
        }
        if method == LORA:
            return {"name": "lora", **shared}
        preset = "function-aware" if method == ACTIVATION else "paper"
        return {"name": "hiplora", "preset": preset, **shared, "principal_rank": self.principal}


def slug(name: str) -> str:
    """Return a name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def mismatch(parameters: dict[str, int]) -> str:
    """Say how far the methods' numbers of trainable parameters are apart."""
    ours, theirs = parameters[HIPLORA], parameters[LORA]
    return (
        f"Trainable parameters: {ours:,} with {HIPLORA}, whose gains are trained too, {theirs:,} with {LORA} "
        f"({100 * (ours - theirs) / theirs:+.2f} %) and with {ACTIVATION}, which has none; the same rank is the "
        "nearest match."
    )
