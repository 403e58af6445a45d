"""The two methods that are compared, with settings that give both the same chance."""

from dataclasses import dataclass
from typing import Any

from hiplora.errors import ConfigError

LORA, HIPLORA = "LoRA", "HiP-LoRA"
METHODS = (LORA, HIPLORA)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Ranks:
    """Ranks of a comparison.

    HiP-LoRA trains r(m + n) + k scalars for an (m, n) weight, LoRA r(m + n). Since k ≤ min(m, n) ≤ (m + n)/2, no
    other LoRA rank comes closer than the same r.
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
        return {"name": "hiplora", **shared, "principal_rank": self.principal}


def slug(name: str) -> str:
    """Return a name as part of a file name."""
    return name.lower().replace(" ", "-")


def mismatch(parameters: dict[str, int]) -> str:
    """Say how far the methods' numbers of trainable parameters are apart."""
    ours, theirs = parameters[HIPLORA], parameters[LORA]
    return (
        f"Trainable parameters: {ours:,} with {HIPLORA}, {theirs:,} with {LORA} "
        f"({100 * (ours - theirs) / theirs:+.2f} %); the same rank is the nearest match."
    )
