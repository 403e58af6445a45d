"""The settings of Orthogonal Subspace Fine-tuning in a recipe."""

from typing import Annotated, Literal

from pydantic import Field

from hiplora.recipes.low_rank import Targeted

EffectiveRank = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)]


class OsfMethod(Targeted):
    """OSF, from PEFT: keeps the leading singular directions of each weight and trains all of the rest.

    Of a square layer it trains, with the default, about as many parameters as the weight has.
    """

    name: Literal["osf"] = Field(default="osf", description="The method.")
    effective_rank: EffectiveRank | None = Field(
        default=None,
        description="Leading singular directions of each weight that are kept; or a share of its smaller side; half of "
        "it if empty. Of a layer (m, n) the (min(m, n) − effective_rank)(m + n + 1) numbers of the others are trained.",
    )
    rank_pattern: dict[str, EffectiveRank] = Field(
        default={}, description="Regular expression for a module's name → its own effective_rank."
    )
