"""How each method that moves the base weights comes to its start.

PiSSA (principal part of W) and CorDA are PEFT's own initialisations. Ours are:

MiLoRA (Wang et al. 2025, arXiv 2406.09044): B₀A₀ is the part of W on its r smallest singular values.

LoRA-Null (Tang et al. 2025, arXiv 2503.02659): N (n, r) are the last r singular vectors of the layer's inputs on
calibration text, B₀A₀ is the SVD of W N Nᵀ, √σ to each factor; both factors are trained (the variant that freezes A
is not here). The paper's text are 256 questions of NQ-open, and its code sums up inputs that are divided by each text's
largest entry; here text and moment `E[xxᵀ]` are those of HiP-LoRA's activation basis. Which r directions are taken
where the null space has more than r, the paper leaves open: the eigensolver's choice.

LoRA's scaling s is in none of these papers' formulas. As in PEFT's PiSSA the factors are divided by √s, so that
the model at the start is the base at every `lora_alpha`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.corda import preprocess_corda
from peft.utils.other import transpose
from torch import Tensor
from tqdm import tqdm

from hiplora.errors import ConfigError
from hiplora.recipes.methods import Targeted
from hiplora.spectral import minor_part, restricted_part
from hiplora.training.adapters import ADAPTER
from hiplora.training.calibration import asked_rows
from hiplora.training.moved import layers, move_base
from hiplora.tuner import HipLoraConfig
from hiplora.tuner.inputs import CalibrationText, least_inputs
from hiplora.tuner.model import for_module
from hiplora.tuner.moments import bare
from hiplora.tuner.targets import survey

PutOn = Callable[[PeftModel], None]
Part = Callable[[str, Tensor], tuple[Tensor, Tensor]]  # layer's name, weight (m, n) → B (m, r), A (r, n)
MOVABLE = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class _Setting:
    """A bare model, and the adapter that is about to be put on it."""

    model: Any
    tokenizer: Any
    method: Any
    config: LoraConfig
    ranks: Mapping[str, int]  # layer → its r


def prepare_start(method: Targeted, config: LoraConfig, model: Any, tokenizer: Any) -> PutOn:
    """Measure on the bare model what a method's start needs; return what starts the adapter once it is on.

    `config` is the one that the adapter is then made with; it may be changed here.

    Raises:
        ConfigError: the modules or ranks do not fit the model, or its weights cannot be moved.
        DataError: the calibration text cannot be used.
        FactorError: a layer saw no calibration text, or NaN.
    """
    ranks = _ranks(config, model)
    return _STARTS[method.name](_Setting(model, tokenizer, method, config, ranks))  # type: ignore[attr-defined]


def without_own_start(config: LoraConfig) -> None:
    """Have PEFT compute no start: the adapter gets one that is known."""
    config.init_lora_weights, config.corda_config = True, None


def _ranks(config: LoraConfig, model: Any) -> dict[str, int]:
    names = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
    chosen: dict[str, Any] = {name: getattr(config, name) for name in names}
    ranks = {}
    for target in survey(model, HipLoraConfig(**chosen)):
        r = ranks[target.name] = for_module(config.rank_pattern or {}, target.name, config.r)
        dtype = model.get_submodule(target.name).weight.dtype
        if r > min(target.shape):
            raise ConfigError(
                f"layer {target.name}: r {r} exceeds min(out, in) = {min(target.shape)}, and the start takes r "
                "directions of the weight; lower r or set rank_pattern"
            )
        if dtype not in MOVABLE:
            raise ConfigError(
                f"layer {target.name}: its weight is {dtype}, from which no part can be taken out; load the model in "
                "fp32, bf16 or fp16, or use another method"
            )
    return ranks


def _of_peft(setting: _Setting) -> PutOn:
    """PEFT rounds factors to the weight's type once their product is taken out; it is taken out anew, as they are."""
    before = {name: setting.model.get_submodule(name).weight.data for name in setting.ranks}

    def put_on(adapted: PeftModel) -> None:
        for name, layer in layers(adapted):
            layer.get_base_layer().weight.data = before[name]
            move_base(layer, layer.lora_B[ADAPTER].weight.data, layer.lora_A[ADAPTER].weight.data)

    return put_on


def _corda(setting: _Setting) -> PutOn:
    """PEFT's CorDA takes the covariance of one row at a time, each divided by its largest entry."""
    if setting.config.target_modules == "all-linear":  # this step of PEFT's takes it for a regular expression
        setting.config.target_modules = list(setting.ranks)
    rows = asked_rows(setting.method, setting.tokenizer)
    text = CalibrationText(setting.model, rows, setting.method.calibration_tokens, 1, 0, None)
    with bare(setting.model):
        preprocess_corda(setting.model, setting.config, text.run)
    return _of_peft(setting)


def _milora(setting: _Setting) -> PutOn:
    return lambda adapted: _put_on(adapted, lambda name, weight: minor_part(weight, setting.ranks[name]))


def _lora_null(setting: _Setting) -> PutOn:
    rows = asked_rows(setting.method, setting.tokenizer)
    least = least_inputs(setting.model, setting.ranks, rows=rows, tokens=setting.method.calibration_tokens)
    return lambda adapted: _put_on(adapted, lambda name, weight: restricted_part(weight, least[name].vectors))


def _put_on(adapted: PeftModel, part: Part) -> None:
    """Start each layer at factors of a part of its weight, scaled such that the adapter gives this part."""
    found = list(layers(adapted))
    for name, layer in tqdm(found, desc="decomposing", unit=" layers", delay=2, leave=False, disable=None):
        weight = layer.get_base_layer().weight.detach()
        B, A = part(name, transpose(weight, layer.fan_in_fan_out))
        root = layer.scaling[ADAPTER] ** 0.5
        move_base(layer, B / root, A / root)


_STARTS: dict[str, Callable[[_Setting], PutOn]] = {
    "corda": _corda,
    "lora_null": _lora_null,
    "milora": _milora,
    "pissa": _of_peft,
}
