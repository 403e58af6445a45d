"""LoRA-Null (Tang et al. 2025, arXiv 2503.02659), the variant that trains both factors.

N (n, r) are the last r eigenvectors of a layer's input second moment on calibration text; training starts at the SVD of
W N Nᵀ. The paper uses 256 questions of NQ-open; here text and moment are those of HiP-LoRA's activation basis.
"""

from typing import Any, ClassVar, Literal

from pydantic import Field

from hiplora.training.method import Begin, FromInputs
from hiplora.training.residual_init import ResidualInit, begin_at, layer_ranks


class LoraNullMethod(ResidualInit, FromInputs):
    """LoRA-Null: starts from what the weights do to the r directions in which the inputs have least energy."""

    title: ClassVar[str] = "LoRA-Null"
    summary: ClassVar[str] = (
        "Trained from the part of the base weights in the directions in which the inputs have least energy; saved as a "
        "plain LoRA of twice the rank."
    )

    name: Literal["lora_null"] = Field(default="lora_null", description="The method.")

    def prepare(self, config: Any, model: Any, tokenizer: Any) -> Begin:
        """Measure the inputs and start at the factors of W N Nᵀ."""
        from hiplora.spectral import projected_factors
        from hiplora.tuner import trailing_inputs

        ranks = layer_ranks(config, model)
        rows = self.calibration_rows(tokenizer)
        least = trailing_inputs(model, ranks, rows=rows, tokens=self.calibration_tokens)
        return begin_at(lambda name, weight: projected_factors(weight, least[name].vectors))
