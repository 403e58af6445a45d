"""LoRA (Hu et al. 2022, arXiv 2106.09685), from PEFT."""

from typing import ClassVar, Literal

from pydantic import Field

from hiplora.training.method import LowRank


class LoraMethod(LowRank):
    """Plain LoRA, from PEFT."""

    title: ClassVar[str] = "LoRA"
    summary: ClassVar[str] = "A plain low-rank update."

    name: Literal["lora"] = Field(default="lora", description="The method.")
