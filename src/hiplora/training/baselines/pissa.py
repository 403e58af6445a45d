"""PiSSA (Meng et al. 2024, arXiv 2404.02948), PEFT's initialisation: training starts from the principal part of W."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from hiplora.training.method import Begin
from hiplora.training.residual_init import ResidualInit, begin_as_peft, layer_ranks


class PissaMethod(ResidualInit):
    """PiSSA, from PEFT: starts from the principal part of the weights; saved as a plain LoRA of rank 2r."""

    title: ClassVar[str] = "PiSSA"
    summary: ClassVar[str] = (
        "Trained from the principal part of the base weights; saved as a plain LoRA of twice the rank."
    )
    peft_start: ClassVar[dict[str, Any]] = {"init_lora_weights": "pissa"}

    name: Literal["pissa"] = Field(default="pissa", description="The method.")

    def prepare(self, config: Any, model: Any, tokenizer: Any) -> Begin:
        """Start where PEFT does."""
        return begin_as_peft(model, layer_ranks(config, model))
