"""CorDA (Yang et al. 2024, arXiv 2406.05223), PEFT's, in knowledge-preserved mode.

PEFT takes the covariance of one row at a time, each divided by its largest entry.
"""

from typing import Any, ClassVar, Literal

from pydantic import Field

from hiplora.training.method import Begin, FromInputs
from hiplora.training.residual_init import ResidualInit, begin_as_peft, layer_ranks


class CordaMethod(ResidualInit, FromInputs):
    """CorDA, from PEFT, knowledge-preserved mode: starts from the part of the weights that the inputs use least."""

    title: ClassVar[str] = "CorDA"
    summary: ClassVar[str] = (
        "Trained from the part of the base weights that the inputs use least; saved as a plain LoRA of twice the rank."
    )
    peft_start: ClassVar[dict[str, Any]] = {
        "init_lora_weights": "corda",
        "corda_config": {"corda_method": "kpm"},
    }

    name: Literal["corda"] = Field(default="corda", description="The method.")

    def prepare(self, config: Any, model: Any, tokenizer: Any) -> Begin:
        """Measure the covariances and start where PEFT does."""
        from peft.tuners.lora.corda import preprocess_corda

        from hiplora.tuner import CalibrationText, base_only

        ranks = layer_ranks(config, model)
        if config.target_modules == "all-linear":  # PEFT's preprocessing takes it for a regular expression
            config.target_modules = list(ranks)
        text = CalibrationText(model, self.calibration_rows(tokenizer), self.calibration_tokens, 1, 0, None)
        with base_only(model):
            preprocess_corda(model, config, text.run)
        return begin_as_peft(model, ranks)
