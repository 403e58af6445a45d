"""`HipLoraConfig`: PEFT's usual fields under PEFT's names, and the method's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig

from hiplora.errors import ConfigError
from hiplora.spectral import EXPECTED_RANK, SIDES, RankSpec, SpectralFactors, is_rank


class _PeftType(str):
    """A string that PEFT and transformers can use like a member of PEFT's enum."""

    name = value = property(str.__str__)

    def __str__(self) -> str:
        return f"PeftType.{self.value}"


PEFT_TYPE = _PeftType("HIPLORA")
HOW_TO_LOAD = (
    "PEFT knows this adapter only where hiplora is installed (`pip install hiplora`) and imported: put "
    "`import hiplora` before `PeftModel.from_pretrained`. For any other client "
    "`hiplora export ADAPTER --to lora --out DIR` makes it a plain LoRA without loss."
)
PRESETS: dict[str, dict[str, Any]] = {
    "function-aware": {"basis": "activation", "principal_channel": False},
    "paper": {"basis": "weight", "principal_channel": True},
}
PROJECTIONS = ("hard", "soft")
CHOICES: dict[str, tuple[Any, ...]] = {
    "preset": tuple(PRESETS),
    "basis": ("weight", "activation"),
    "basis_sides": SIDES,
    "projection": PROJECTIONS,
    "stability_mode": ("gradient", "proximal", "none"),
    "init_weights": (True, False, "zero"),
    **dict.fromkeys(("principal_channel", "residual_projection", "gradient_projection"), (True, False)),
    **dict.fromkeys(("relative_gains", "save_factors"), (True, False)),
}


def _number(accept: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return a check of finite numbers."""
    kinds = (int, float)
    return lambda v: isinstance(v, kinds) and not isinstance(v, bool) and math.isfinite(v) and accept(v)


def _list_of(kind: type, alone: bool = True) -> Callable[[Any], bool]:
    """Return a check of collections of a kind and of None; `alone` accepts a single value too."""

    def accept(value: Any) -> bool:
        if value is not None and not isinstance(value, (list, tuple, set)):
            return alone and isinstance(value, kind) and not isinstance(value, bool)
        return all(isinstance(item, kind) and not isinstance(item, bool) for item in value or ())

    return accept


RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_number(lambda v: isinstance(v, int) and v >= 1), "an integer of at least 1"),
    "principal_rank": (is_rank, EXPECTED_RANK),
    "lora_alpha": (_number(lambda v: v > 0), "a number above 0"),
    "lora_dropout": (_number(lambda v: 0 <= v < 1), "a probability in [0, 1)"),
    "stability_weight": (_number(lambda v: v >= 0), "a number of at least 0"),
    "stability_gamma": (_number(lambda v: v >= 0), "a number of at least 0"),
    "gain_lr_ratio": (_number(lambda v: v > 0), "a number above 0"),
    "svd_tolerance": (_number(lambda v: 0 < v <= 1e-2), "a number in (0, 0.01]"),
    "layers_to_transform": (_list_of(int), "an index or a list of indices"),
    **dict.fromkeys(("target_modules", "exclude_modules"), (_list_of(str), "names or a regular expression")),
    **dict.fromkeys(("target_parameters", "modules_to_save"), (_list_of(str, alone=False), "a list of names")),
}
PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern", "principal_rank": "principal_rank_pattern"}


@dataclass
class HipLoraConfig(PeftConfig):
    """Configuration of a HiP-LoRA adapter.

    Args:
        preset: what fields that are not given default to. "function-aware", the default: `basis="activation"`,
            `principal_channel=False`, on the MLP projections. "paper" (Appendix B): `basis="weight"`,
            `principal_channel=True`, on the attention projections. All other defaults are the paper's.
        r: rank of the residual channel, ≥ 1.
        lora_alpha: the residual channel is scaled by `lora_alpha / r` (Eq. 3); the gains never are.
        lora_dropout: dropout on the residual channel's input, in [0, 1).
        target_modules: names, a regular expression, or "all-linear"; None takes the preset's, found by their role.
        target_parameters: names of 3-D parameters that hold a mixture's experts (`experts.down_proj`), adapted one by
            one; a name in `target_modules` means the experts' projection too.
        exclude_modules: names or a regular expression of modules to leave alone.
        layers_to_transform: indices of the layers to adapt; all if None.
        layers_pattern: name of the layer list, where `layers_to_transform` needs it.
        rank_pattern: module name or regular expression → its own `r`.
        alpha_pattern: module name or regular expression → its own `lora_alpha`.
        principal_rank_pattern: module name or regular expression → its own `principal_rank`, of any of these kinds.
        modules_to_save: modules trained and saved in full.
        init_weights: True: ΔW = 0, A Kaiming-uniform and then projected, B = 0, δ = 0. "zero": A = B = 0, the
            paper's ablation, whose residual channel can never move. False: random, ΔW ≠ 0, for tests.
        principal_rank: k, the number of protected directions, at most min(out, in); or a fraction of min(out, in) in
            (0, 1); or "energy:0.95": per layer, the fewest directions that hold this share of the energy of its inputs
            (activation basis) or of ‖W‖² (weight basis).
        stability_weight: λ ≥ 0 of Eq. 7, the price of moving the gains. The paper's value is not readable; 0.1
            is this project's choice.
        stability_gamma: γ ≥ 0 of Eq. 6; 0 weighs all directions equally.
        stability_mode: "gradient" adds Eq. 7's gradient once per optimizer step; "proximal" shrinks the gains
            after the step; "none" leaves it to the caller (`hiplora.stability_penalty`).
        gain_lr_ratio: learning rate of the gains, in units of the optimizer's.
        relative_gains: step on the relative gains ρ = δ/σ instead of δ: strong directions move by more.
        residual_projection: keep the residual channel in the two-sided complement (Eq. 4).
        gradient_projection: project the gradients of the residual channel too, before clipping and the optimizer, so
            that they are those of Eq. 5 as written. False is the paper's implementation note, retraction after the step
            alone; adapters saved before this field existed carry on so.
        principal_channel: learn gains δ on the protected directions (Eq. 2). None takes the preset's, or True where an
            option of the gains is not at its default.
        basis: where the protected directions come from. "weight": the weight's SVD. "activation": the layer's inputs,
            and the outputs that predictions depend on (`hiplora.calibrate`, by default on text sampled from the model).
        basis_sides: which sides the residual channel keeps out of: "both", "input" or "output".
        svd_tolerance: largest accepted residual of the singular triplets, in units of σ₁.
        projection: "hard" keeps the residual channel out of the protected directions altogether (Eq. 4); "soft" (with
            the activation basis) attenuates each by its energy: a fixed filter inside the factors.
        save_factors: save U, σ and V with the adapter; False recomputes them from the base model on load.
        fingerprints: filled in by the tuner: module → value hash of the weight that the adapter was made for.
        weight_samples: filled in by the tuner: module → hash of some of that weight's values, which loading compares
            (`hiplora.verify_base` compares all).
        principal_ranks: filled in by the tuner: module → k, where `principal_rank` depends on the layer.
        base_precision: filled in by the tuner: dtype (or quantisation) of those weights.
        calibration: filled in by the calibration: source and number of its tokens, and a key of model and text.
        how_to_load: filled in: what a reader of adapter_config.json has to do; PEFT alone says KeyError: HIPLORA.

    Raises:
        ConfigError: a value is out of range, of the wrong type, or contradicts another; it names the field.
    """

    preset: str = None  # type: ignore[assignment]  # "function-aware"
    r: int = 16
    lora_alpha: int | float = 32
    lora_dropout: float = 0.05
    target_modules: list[str] | set[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int | float] = field(default_factory=dict)
    principal_rank_pattern: dict[str, RankSpec] = field(default_factory=dict)
    modules_to_save: list[str] | None = None
    init_weights: bool | str = True
    principal_rank: RankSpec = 32
    stability_weight: float = 0.1
    stability_gamma: float = 1.0
    stability_mode: str = "gradient"
    gain_lr_ratio: float = 1.0
    relative_gains: bool = False
    residual_projection: bool = True
    gradient_projection: bool = None  # type: ignore[assignment]  # True
    principal_channel: bool = None  # type: ignore[assignment]  # the preset's
    basis: str = None  # type: ignore[assignment]  # the preset's
    basis_sides: str = "both"
    projection: str = "hard"
    svd_tolerance: float = 1e-4
    save_factors: bool = True
    fingerprints: dict[str, str] = field(default_factory=dict)
    weight_samples: dict[str, str] = field(default_factory=dict)
    principal_ranks: dict[str, int] = field(default_factory=dict)
    base_precision: str = ""
    calibration: dict[str, Any] = field(default_factory=dict)
    how_to_load: str = HOW_TO_LOAD

    def __post_init__(self) -> None:
        """Fill unset fields from the preset, and check all of them."""
        super().__post_init__()
        self.peft_type = PEFT_TYPE  # type: ignore[assignment]  # a string where PEFT has an enum
        self.how_to_load = HOW_TO_LOAD
        self.from_checkpoint = bool(self.fingerprints)  # from an adapter folder: its base is verified
        self.awaits_file = False  # whether a file is expected to bring the factors
        self.unverified: set[str] = set()  # modules whose base, in another precision, the saved factors must match
        self.calibrated: dict[str, SpectralFactors] = {}  # module → factors, until the tuner has taken them
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, set(value))
        if self.preset is None:
            # A saved configuration from before there were presets: its defaults were the paper's.
            had_no_preset = self.from_checkpoint and self.basis != "activation"
            self.preset = "paper" if had_no_preset else "function-aware"
        if self.principal_channel is None and self._gain_settings():
            self.principal_channel = True
        for name, value in PRESETS.get(str(self.preset), {}).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.gradient_projection is None:
            # A saved configuration without the field was trained by retraction alone, where it was closed.
            self.gradient_projection = not (self.from_checkpoint and self.is_closed)
        self._check_values()
        self._check_combinations()

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, and into the model card that PEFT has just written how to load the adapter."""
        super().save_pretrained(save_directory, **kwargs)
        card = Path(save_directory) / "README.md"
        if card.is_file() and HOW_TO_LOAD not in (text := card.read_text(encoding="utf-8")):
            card.write_text(f"{text.rstrip()}\n\n### How to load\n\n{HOW_TO_LOAD}\n", encoding="utf-8")

    @property
    def is_closed(self) -> bool:
        """Whether the residual channel promises to keep out of the protected directions altogether."""
        return self.residual_projection and self.projection == "hard"

    def _check_values(self) -> None:
        for name, options in CHOICES.items():
            value = getattr(self, name)
            if not any(type(value) is type(option) and value == option for option in options):
                raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(map(repr, options))}")
        for name in PATTERNS.values():
            if not isinstance(pattern := getattr(self, name) or {}, dict):
                raise ConfigError(f"{name} is {pattern!r}; expected a dictionary, modules' names → values")
            setattr(self, name, pattern)
        for name, (accept, expected) in RANGES.items():
            values = {name: getattr(self, name)}
            if name in PATTERNS:
                values |= {f"{PATTERNS[name]}[{key!r}]": value for key, value in getattr(self, PATTERNS[name]).items()}
            for label, value in values.items():
                if not accept(value):
                    raise ConfigError(f"{label} is {value!r}; expected {expected}")

    def _gain_settings(self) -> list[str]:
        """Return the fields that are not at their default and matter only where there are gains."""
        names = ["gain_lr_ratio", "relative_gains"]
        if self.stability_weight != 0 and self.stability_mode != "none":  # without a price there need be no gains
            names = ["stability_weight", "stability_gamma", "stability_mode", *names]
        changed = [name for name in names if getattr(self, name) != getattr(HipLoraConfig, name)]
        return changed + ["init_weights"] * (self.init_weights == "zero")  # A and B stay zero

    def _check_combinations(self) -> None:
        gain_settings = self._gain_settings()
        layers = [name for name in ("layers_to_transform", "layers_pattern") if getattr(self, name) is not None]
        problem = ""
        if self.projection == "soft" and (self.basis != "activation" or not self.residual_projection):
            problem = (
                "projection is 'soft', which needs basis='activation' and residual_projection=True; or use 'hard'"
            )
        elif not self.gradient_projection and not self.is_closed:
            problem = "gradient_projection is False, but without a hard projection nothing retracts; leave it out"
        elif self.basis == "activation" and not self.save_factors:
            problem = (
                "save_factors is False, but the activation basis cannot be recomputed from weights; leave it True"
            )
        elif gain_settings and not self.principal_channel and not self.from_checkpoint:
            name = gain_settings[0]
            problem = f"{name} is {getattr(self, name)!r}, which has no use with principal_channel=False; drop it"
        elif not self.residual_projection and not self.principal_channel:
            problem = (
                "residual_projection and principal_channel are both False, which is plain LoRA; use peft.LoraConfig"
            )
        elif layers and isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            problem = f"{layers[0]} does not go with the regular expression {self.target_modules!r}; put it in there"
        elif layers == ["layers_pattern"]:
            problem = "layers_pattern needs layers_to_transform; set both or neither"
        if problem:
            raise ConfigError(problem)
