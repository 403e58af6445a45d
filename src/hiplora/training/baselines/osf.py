"""OSF, Orthogonal Subspace Fine-tuning (Nayak et al. 2025, arXiv 2504.07097), from PEFT."""

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from hiplora.errors import ConfigError
from hiplora.training.method import Method

if TYPE_CHECKING:
    from peft import PeftConfig

    from hiplora.training.recipe import TrainSettings

EffectiveRank = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)]


class OsfMethod(Method):
    """OSF, from PEFT: keeps the leading singular directions of each weight and trains all others.

    For a square layer and the default rank it trains about as many parameters as the weight has. Set
    `train.weight_decay` to 0: it would shrink what is trained, a part of the weights themselves.
    """

    title = "OSF"
    summary = (
        "The leading singular directions of each weight are kept and all others were trained: far more parameters "
        "than a low-rank update has."
    )
    kind = "an OSF adapter"

    name: Literal["osf"] = "osf"
    """The method."""
    effective_rank: EffectiveRank | None = None
    """Leading singular directions of each weight that are kept; or a share of its smaller side; half of it if empty.
    Of a layer (m, n) the (min(m, n) − effective_rank)(m + n + 1) numbers of the others are trained."""
    rank_pattern: dict[str, EffectiveRank] = Field(default={})
    """Regular expression for a module's name → its own effective_rank."""

    def peft_config(self, steps: int | None = None) -> "PeftConfig":
        """Return an OSF configuration."""
        from peft import OSFConfig

        return OSFConfig(task_type="CAUSAL_LM", **self.settings())

    def check_training(self, train: "TrainSettings") -> None:
        """Check that there are weights to train."""
        if train.load_in_4bit:
            raise ValueError("`train.load_in_4bit` holds weights that osf trains; remove it, or use another method")

    def check_layer(self, config: Any, layer: Any) -> None:
        """Check that directions are left to train; PEFT would train none, in silence."""
        patterned = (rank for pattern, rank in self.rank_pattern.items() if re.search(pattern, layer.name))
        rank, least = next(patterned, self.effective_rank), min(layer.shape)
        if isinstance(rank, int) and rank >= least:
            what = f"effective_rank {rank} keeps all of its min(out, in) = {least} directions and leaves none to train"
            raise ConfigError(f"layer {layer.name}: {what}; lower it or set rank_pattern")
