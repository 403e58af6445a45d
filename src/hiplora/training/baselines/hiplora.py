"""HiP-LoRA in recipes, and Proj-LoRA, its form without gains under the name of the paper's rival row."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from hiplora.errors import ConfigError
from hiplora.training.method import ATTENTION_PROJECTIONS, FromInputs, LowRank

if TYPE_CHECKING:
    from peft import PeftConfig

    from hiplora.tuner import Calibration

MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
ROLES = {"function-aware": MLP_PROJECTIONS, "paper": ATTENTION_PROJECTIONS}
PAPER: dict[str, Any] = {"basis": "weight", "target_modules": list(ATTENTION_PROJECTIONS)}
OF_THE_GAINS = ("stability_weight", "stability_gamma", "stability_mode", "gain_lr_ratio", "relative_gains")
OF_THE_FACTORS = ("fingerprints", "weight_samples", "principal_ranks", "base_precision", "calibration")
Rank = (
    Annotated[int, Field(ge=1)]
    | Annotated[float, Field(gt=0, lt=1)]
    | Annotated[str, Field(pattern=r"^energy:0?\.\d*[1-9]\d*$")]
)


class Spectral(FromInputs, LowRank):
    """Base of the methods with protected directions."""

    summary = (
        "A low-rank update in the complement of directions that are protected: the base weights' leading singular "
        "directions (`basis: weight`), or those that the layers are fed and the predictions depend on most "
        "(`basis: activation`). With `principal_channel` it learns a gain for each of these directions, at a price."
    )
    kind = None
    steering = ("preset", "lora_dropout", "gradient_projection", *OF_THE_GAINS)
    not_of_peft = ("name", "calibration_text", "calibration_tokens")

    preset: Literal["function-aware", "paper"] = "function-aware"
    """Defaults of the other fields. `function-aware`: the MLP projections and `basis: activation`, measured to disturb
    a model least. `paper`: the attention projections, `basis: weight` and gains."""
    target_modules: list[str] | str = Field(default=list(MLP_PROJECTIONS), min_length=1)
    """Modules to adapt: a list of names, one regular expression, or `all-linear`."""
    principal_rank: Rank = 32
    """k: number of leading directions to protect; or a fraction of a layer's smaller side; or `energy:0.95`, as many
    as hold this share of the energy of a layer's inputs (of ‖W‖², for the weight basis)."""
    principal_rank_pattern: dict[str, Rank] = Field(default={})
    """Module name or pattern → its own principal_rank."""
    basis: Literal["weight", "activation"] = "activation"
    """Source of the protected directions: `weight`, its SVD (the paper's); `activation`, the measured inputs."""
    basis_sides: Literal["both", "input", "output"] = "both"
    """Sides on which the low-rank part is kept out."""
    projection: Literal["hard", "soft"] = "hard"
    """`hard` removes the protected directions from the low-rank part; `soft` (activation basis) damps by energy."""
    gradient_projection: bool = True
    """Project the low-rank part's gradients before clipping; false, as in the paper, only retracts after the step."""
    svd_tolerance: float = Field(default=1e-4, gt=0, le=1e-2)
    """Largest accepted residual of a singular triplet, in units of σ₁."""
    save_factors: bool = True
    """Save U, σ and V with the adapter; false computes them again when it is loaded."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        paper = value.get("preset") == "paper"
        defaults = dict(PAPER) if paper else {}
        if "principal_channel" in cls.model_fields and (paper or cls._changed_gain_fields(value)):
            defaults["principal_channel"] = True
        return {**defaults, **value}

    @classmethod
    def _changed_gain_fields(cls, value: Mapping[str, Any]) -> list[str]:
        """Return the fields whose value only has a meaning where there are gains, as in `HipLoraConfig`."""
        unpriced = value.get("stability_weight") == 0 or value.get("stability_mode") == "none"
        fields = {name: cls.model_fields[name] for name in OF_THE_GAINS if name in cls.model_fields and name in value}
        names = [name for name in fields if not (unpriced and name.startswith("stability"))]
        return [name for name in names if value[name] != fields[name].default]

    @model_validator(mode="after")
    def _basis_fits(self) -> "Spectral":
        measured = self.basis == "activation"
        if not measured and (self.calibration_text is not None or self.projection == "soft"):
            raise ValueError("`calibration_text` and `projection: soft` need `basis: activation`; remove them")
        if measured and not self.save_factors:
            raise ValueError("`save_factors: false` needs basis weight; remove it, or use preset paper")
        if not self.gradient_projection and not self.is_closed:
            raise ValueError("`gradient_projection: false` has no use without a hard projection; remove it")
        return self

    @property
    def is_closed(self) -> bool:
        """Whether the low-rank part is kept out of the protected directions altogether."""
        return self.projection == "hard" and getattr(self, "residual_projection", True)

    def peft_config(self, steps: int | None = None) -> "PeftConfig":
        """Return a HiP-LoRA configuration; the preset's own modules are found by their role in the model."""
        from hiplora.tuner import HipLoraConfig

        settings = {"principal_channel": False, **self.settings()}
        if settings["target_modules"] == list(ROLES[self.preset]):
            settings["target_modules"] = None
        return HipLoraConfig(task_type="CAUSAL_LM", **settings)

    def continued_config(self, stored: Mapping[str, Any]) -> "PeftConfig":
        """Return the configuration with the factors of the stored adapter."""
        return replace(self.peft_config(), **{name: stored[name] for name in OF_THE_FACTORS if name in stored})

    def check_layer(self, config: Any, layer: Any) -> None:
        """Check that a residual of rank r is left beside the protected directions."""
        import torch

        from hiplora.spectral import resolve_rank

        super().check_layer(config, layer)
        (m, n), r, least = layer.shape, self.rank_of(config, layer), min(layer.shape)
        # A share of the energy is known when it is measured.
        k = 0 if isinstance(layer.k, str) else resolve_rank(layer.k, layer.shape, lambda: torch.ones(1))
        protected = k if self.is_closed else 0
        free = min(m - protected * (self.basis_sides != "input"), n - protected * (self.basis_sides != "output"))
        if k > least or r > free:
            raise ConfigError(
                f"layer {layer.name}: principal_rank {k} and r {r} do not fit into its min(out, in) = {least} "
                "directions; lower one of them, or set principal_rank_pattern or rank_pattern"
            )

    @property
    def widens(self) -> bool:
        """Whether a training that carries on may protect more: the function-aware basis, without gains."""
        gains = getattr(self, "principal_channel", False)
        return self.basis == "activation" and self.projection == "hard" and not gains

    def prepare(self, config: Any, model: Any, tokenizer: Any) -> None:
        """Measure the activation basis into the configuration."""
        if config.basis == "activation":
            self.calibrate(config, model, tokenizer)

    def calibrate(self, config: Any, model: Any, tokenizer: Any, store: Any = None) -> "Calibration":
        """Measure the activation basis into `config`; `store`, by default the cache, keeps measurements."""
        from hiplora.data.texts import describe_source
        from hiplora.tuner import calibrate

        text, tokens = self.calibration_text, self.calibration_tokens
        options: dict[str, Any] = {}
        if text:
            options = {"source": describe_source(text), "rows": self.calibration_rows(model, tokenizer)}
        return calibrate(model, config, tokens=tokens, store=store, tokenizer=tokenizer, **options)


class ProjLoraMethod(Spectral):
    """Proj-LoRA: LoRA kept in the complement of the protected directions, without gains."""

    title = "Proj-LoRA"

    name: Literal["proj_lora"] = "proj_lora"
    """The method."""


class HipLoraMethod(Spectral):
    """HiP-LoRA: LoRA in the complement of the protected directions, and (the paper's) learned gains on them."""

    title = "HiP-LoRA"

    name: Literal["hiplora"] = "hiplora"
    """The method."""
    principal_channel: bool = False
    """Learn gains on the protected directions, as the paper's preset does, or where a field below on gains is not at
    its default."""
    stability_weight: float = Field(default=0.1, ge=0)
    """λ: price of changing the gains. The paper's value is lost; this one is ours."""
    stability_gamma: float = Field(default=1.0, ge=0)
    """γ: how much more large gains cost; 0 prices all alike."""
    stability_mode: Literal["gradient", "proximal", "none"] = "gradient"
    """`gradient` adds the price's gradient once a step, `proximal` shrinks the gains after it, `none` is no price."""
    gain_lr_ratio: float = Field(default=1.0, gt=0)
    """Learning rate of the gains, in units of `train.lr`."""
    relative_gains: bool = False
    """Step on relative gains δ/σ: strong directions move by more."""
    residual_projection: bool = True
    """Keep the low-rank part out of the protected directions; false is an ablation."""
    init_weights: bool | Literal["zero"] = True
    """true: start at the base model; `zero`: both factors start and stay at zero (ablation); false: random."""

    @model_validator(mode="after")
    def _gains_have_a_channel(self) -> "HipLoraMethod":
        values = {} if self.principal_channel else {name: getattr(self, name) for name in OF_THE_GAINS}
        if changed := self._changed_gain_fields(values):
            raise ValueError(
                f"`{changed[0]}` concerns the gains, and there are none; remove `principal_channel: false`"
            )
        if not self.principal_channel and not self.residual_projection:
            raise ValueError("no gains and no projection is plain LoRA; set `principal_channel`, or use lora")
        return self
