"""MiLoRA (Wang et al. 2025, arXiv 2406.09044): training starts from the r smallest singular values of W."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from hiplora.training.method import Begin
from hiplora.training.residual_init import ResidualInit, begin_at, layer_ranks


class MiloraMethod(ResidualInit):
    """MiLoRA: starts from the minor part of the weights; saved as a plain LoRA of rank 2r."""

    title: ClassVar[str] = "MiLoRA"
    summary: ClassVar[str] = (
        "Trained from the minor part of the base weights; saved as a plain LoRA of twice the rank."
    )

    name: Literal["milora"] = Field(default="milora", description="The method.")

    def prepare(self, config: Any, model: Any, tokenizer: Any) -> Begin:
        """Start at the factors of the r smallest singular values."""
        from hiplora.spectral import minor_svd_factors

        ranks = layer_ranks(config, model)
        return begin_at(lambda name, weight: minor_svd_factors(weight, ranks[name]))
