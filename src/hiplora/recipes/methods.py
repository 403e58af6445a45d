"""The methods that a recipe can name, each with exactly the settings that apply to it."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from hiplora.errors import ConfigError
from hiplora.recipes.adalora import AdaLoraMethod
from hiplora.recipes.low_rank import ATTENTION_PROJECTIONS, Block, LowRank, Targeted
from hiplora.recipes.osf import OsfMethod

__all__ = [
    "ATTENTION_PROJECTIONS",
    "METHODS",
    "AdaLoraMethod",
    "Block",
    "LowRank",
    "Method",
    "OsfMethod",
    "Targeted",
]

MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
PAPER: dict[str, Any] = {"basis": "weight", "target_modules": list(ATTENTION_PROJECTIONS)}
OF_THE_GAINS = ("stability_weight", "stability_gamma", "stability_mode", "gain_lr_ratio", "relative_gains")
OF_THE_SPLIT = ("clients", "cut_layer", "average_every")
Rank = (
    Annotated[int, Field(ge=1)]
    | Annotated[float, Field(gt=0, lt=1)]
    | Annotated[str, Field(pattern=r"^energy:0?\.\d*[1-9]\d*$")]
)


class LoraMethod(LowRank):
    """Plain LoRA, from PEFT."""

    name: Literal["lora"] = Field(default="lora", description="The method.")


class PissaMethod(LowRank):
    """PiSSA, from PEFT: starts from the principal part of the weights; saved as a plain LoRA of rank 2r."""

    moves_base: ClassVar[bool] = True
    name: Literal["pissa"] = Field(default="pissa", description="The method.")


class MiloraMethod(LowRank):
    """MiLoRA: starts from the minor part of the weights; saved as a plain LoRA of rank 2r."""

    moves_base: ClassVar[bool] = True
    name: Literal["milora"] = Field(default="milora", description="The method.")


class FromInputs(LowRank):
    """What the methods share that start where the inputs of a layer leave it free."""

    moves_base: ClassVar[bool] = True
    calibration_text: str | None = Field(
        default=None,
        min_length=1,
        description="Text file or training data that shows what the layers are fed, instead of text sampled from the "
        "model. In a recipe, relative to the recipe's folder; with --set, to the current folder.",
    )
    calibration_tokens: int = Field(
        default=10_000, ge=2, description="Tokens to sample, or to read of `calibration_text`."
    )


class CordaMethod(FromInputs):
    """CorDA, from PEFT, knowledge-preserved mode: starts from the part of the weights that the inputs use least."""

    name: Literal["corda"] = Field(default="corda", description="The method.")


class LoraNullMethod(FromInputs):
    """LoRA-Null: starts from what the weights do to the r directions in which the inputs have least energy."""

    name: Literal["lora_null"] = Field(default="lora_null", description="The method.")


class SplitLoraMethod(LowRank):
    """Split-LoRA: clients train the layers below a cut on shards of the data, a server the others on all of it."""

    name: Literal["split_lora"] = Field(default="split_lora", description="The method.")
    clients: int = Field(
        default=4,
        ge=1,
        description="How many clients there are. Sequence i of the training data is client i mod `clients`'s; a step "
        "takes a batch of each in turn, so `train.gradient_accumulation` must be a multiple of it.",
    )
    cut_layer: int = Field(
        default=3,
        ge=0,
        description="Layers below this one are on the clients' side, those from it up on the server's; 0 leaves the "
        "clients nothing, the number of layers the server nothing.",
    )
    average_every: int = Field(
        default=25,
        ge=1,
        description="Optimizer steps between two averagings of the clients' sides; the last step has one too.",
    )


def check_cut(cut_layer: int, layers: int) -> None:
    """Check that a model with so many layers can be cut below this one.

    Raises:
        ConfigError: it has fewer.
    """
    if cut_layer > layers:
        raise ConfigError(
            f"method.cut_layer {cut_layer}: the model has only {layers} layers; expected 0 to {layers}, the number "
            "of layers on the clients' side"
        )


class Spectral(LowRank):
    """What the methods with protected directions share."""

    preset: Literal["function-aware", "paper"] = Field(
        default="function-aware",
        description="What the fields default to: `function-aware`, the settings that were measured to disturb a model "
        "least (the MLP projections and `basis: activation`, which samples text from the model before training); "
        "`paper`, the paper's (the attention projections and `basis: weight`).",
    )
    target_modules: list[str] | str = Field(
        default=list(MLP_PROJECTIONS),
        min_length=1,
        description="Modules to adapt: a list of names, one regular expression, or `all-linear`.",
    )
    principal_rank: Rank = Field(
        default=32,
        description="k: how many leading directions are protected; or a fraction of a layer's smaller side; or "
        "`energy:0.95`, as many as hold this share of the energy of a layer's inputs (of ‖W‖², for the weight basis).",
    )
    principal_rank_pattern: dict[str, Rank] = Field(
        default={}, description="Module name or pattern → its own principal_rank."
    )
    basis: Literal["weight", "activation"] = Field(
        default="activation",
        description="Where the protected directions come from: `weight`, its SVD, as in the paper; `activation`, the "
        "inputs that the layer really gets, measured on text sampled from the model.",
    )
    basis_sides: Literal["both", "input", "output"] = Field(
        default="both", description="Which sides the low-rank part is kept out of."
    )
    projection: Literal["hard", "soft"] = Field(
        default="hard",
        description="`hard` keeps the low-rank part out of the protected directions altogether; `soft`, with "
        "`basis: activation`, lets each pass the less, the more energy it has.",
    )
    calibration_text: str | None = Field(
        default=None,
        min_length=1,
        description="Text file or training data that shows the activation basis what the layers are fed, instead of "
        "text sampled from the model. In a recipe, relative to the recipe's folder; with --set, to the current folder.",
    )
    calibration_tokens: int = Field(
        default=10_000, ge=2, description="Tokens to sample, or to read of `calibration_text`."
    )
    svd_tolerance: float = Field(
        default=1e-4,
        gt=0,
        le=1e-2,
        description="Largest accepted residual of a singular triplet, in units of σ₁.",
    )
    save_factors: bool = Field(
        default=True,
        description="Save U, σ and V with the adapter; false computes them again when it is loaded.",
    )

    @model_validator(mode="before")
    @classmethod
    def _take_the_preset(cls, value: Any) -> Any:
        if not isinstance(value, dict) or value.get("preset") != "paper":
            return value
        gains = {"principal_channel": True} if "principal_channel" in cls.model_fields else {}
        return {**PAPER, **gains, **value}

    @model_validator(mode="after")
    def _text_has_a_use(self) -> "Spectral":
        if self.calibration_text is not None and self.basis != "activation":
            raise ValueError(
                f"`calibration_text` has no use with basis {self.basis}; remove it, or use activation"
            )
        if self.basis == "activation" and not self.save_factors:
            raise ValueError("`save_factors: false` needs basis weight; remove it, or use preset paper")
        if self.projection == "soft" and self.basis != "activation":
            raise ValueError("`projection: soft` needs basis activation; remove it, or use that")
        return self


class ProjLoraMethod(Spectral):
    """Proj-LoRA: LoRA kept in the complement of the protected directions, without gains."""

    name: Literal["proj_lora"] = Field(default="proj_lora", description="The method.")


class HipLoraMethod(Spectral):
    """HiP-LoRA: LoRA in the complement of the protected directions, and (the paper's) learned gains on them."""

    name: Literal["hiplora"] = Field(default="hiplora", description="The method.")
    principal_channel: bool = Field(
        default=False,
        description="Learn gains on the protected directions. False, as measured best, with the function-aware preset; "
        "true with the paper's. The fields below that concern gains need it.",
    )
    stability_weight: float = Field(
        default=0.1,
        ge=0,
        description="λ: price of changing the gains. The paper's value is lost; this one is ours.",
    )
    stability_gamma: float = Field(
        default=1.0, ge=0, description="γ: how much dearer large gains are; 0 prices all alike."
    )
    stability_mode: Literal["gradient", "proximal", "none"] = Field(
        default="gradient",
        description="`gradient` adds the price's gradient once per step, `proximal` shrinks the gains after it, `none` "
        "charges nothing (the ablation without a budget).",
    )
    gain_lr_ratio: float = Field(
        default=1.0, gt=0, description="Learning rate of the gains, in units of `train.lr`."
    )
    relative_gains: bool = Field(
        default=False, description="Step on relative gains δ/σ: strong directions move by more."
    )
    residual_projection: bool = Field(
        default=True,
        description="Keep the low-rank part out of the protected directions; false is an ablation.",
    )
    init_weights: bool | Literal["zero"] = Field(
        default=True,
        description="true: start at the base model. `zero`: both low-rank factors start at zero, the paper's ablation, "
        "and stay there. false: a random start, for tests.",
    )

    @model_validator(mode="after")
    def _gains_have_a_channel(self) -> "HipLoraMethod":
        fields = type(self).model_fields
        changed = [name for name in OF_THE_GAINS if getattr(self, name) != fields[name].default]
        if changed and not self.principal_channel:
            raise ValueError(
                f"`{changed[0]}` concerns the gains, and there are none; set `principal_channel: true`"
            )
        if not self.principal_channel and not self.residual_projection:
            raise ValueError(
                "neither gains nor a projection is plain LoRA; set `principal_channel: true`, or use method lora"
            )
        return self


METHODS: dict[str, type[Targeted]] = {
    "adalora": AdaLoraMethod,
    "corda": CordaMethod,
    "hiplora": HipLoraMethod,
    "lora": LoraMethod,
    "lora_null": LoraNullMethod,
    "milora": MiloraMethod,
    "osf": OsfMethod,
    "pissa": PissaMethod,
    "proj_lora": ProjLoraMethod,
    "split_lora": SplitLoraMethod,
}
Method = Annotated[
    AdaLoraMethod
    | CordaMethod
    | HipLoraMethod
    | LoraMethod
    | LoraNullMethod
    | MiloraMethod
    | OsfMethod
    | PissaMethod
    | ProjLoraMethod
    | SplitLoraMethod,
    Field(discriminator="name"),
]
