"""LoRA from PEFT, and the initialisations of LoRA that start it at a part of the base weight and subtract that part.

A start is a pair of factors A₀ (r, n), B₀ (m, r) a layer. The base weight W becomes W − s·B₀A₀, with LoRA's scaling s,
and the adapter begins at A₀, B₀: together they are W, to rounding. The trained A and B are saved as the difference from
the untouched base, a plain LoRA of rank 2r with the factors [A; A₀] and [B, −B₀] at the same s.

None of the papers has s in its formulas. As in PEFT's PiSSA the factors are divided by √s, so that the model begins as
the base model at every `lora_alpha`. PEFT's own conversion is not used: it knows only its own methods and leaves out
`modules_to_save`.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hiplora.errors import ConfigError
from hiplora.files import write_atomic
from hiplora.training.method import ADAPTER, WEIGHTS_FILE, Begin, FromInputs, LowRank

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

    Pair = tuple[Tensor, Tensor]  # B (m, r), A (r, n)

A_NAME, B_NAME = ".lora_A.weight", ".lora_B.weight"
SUMMARY = "Trained from {}; saved as a plain LoRA of twice the rank."


class LoraMethod(LowRank):
    """Plain LoRA (Hu et al. 2022, arXiv 2106.09685), from PEFT."""

    title = "LoRA"
    summary = "A plain low-rank update."

    name: Literal["lora"] = "lora"
    """The method."""


class ResidualInit(LowRank):
    """Base of the initialisations; those that are PEFT's own have a `peft_start`, the others `parts`."""

    moves_base = True
    not_of_peft = ("name", "calibration_text", "calibration_tokens")

    def prepare(self, config: Any, model: Any, tokenizer: Any) -> Begin:
        """Start at `parts`, divided by √s, or where PEFT starts; subtract that in fp32, which PEFT does not."""
        from peft.utils.other import transpose

        ranks = layer_ranks(config, model)
        originals = {name: model.get_submodule(name).weight.data for name in ranks if self.peft_start}
        part = None if self.peft_start else self.parts(ranks, model, tokenizer)

        def factors(name: str, layer: Any) -> "Pair":
            if part is None:
                layer.get_base_layer().weight.data = originals[name]
                return layer.lora_B[ADAPTER].weight.data, layer.lora_A[ADAPTER].weight.data
            B, A = part(name, transpose(layer.get_base_layer().weight.detach(), layer.fan_in_fan_out))
            root = layer.scaling[ADAPTER] ** 0.5
            return B / root, A / root

        return _begin_at(factors)

    def parts(self, ranks: Mapping[str, int], model: Any, tokenizer: Any) -> "Callable[[str, Tensor], Pair]":
        """Return what gives the factors B, A of the part of a layer's weight (m, n) to start from."""
        raise NotImplementedError


class PissaMethod(ResidualInit):
    """PiSSA (Meng et al. 2024, arXiv 2404.02948), from PEFT: starts from the principal part of the weights."""

    title = "PiSSA"
    summary = SUMMARY.format("the principal part of the base weights")
    peft_start: ClassVar[dict[str, Any]] = {"init_lora_weights": "pissa"}

    name: Literal["pissa"] = "pissa"
    """The method."""


class CordaMethod(ResidualInit, FromInputs):
    """CorDA (Yang et al. 2024, arXiv 2406.05223), from PEFT, knowledge-preserved: starts from what inputs use least.

    PEFT takes the covariance of one row at a time, each divided by its largest entry.
    """

    title = "CorDA"
    summary = SUMMARY.format("the part of the base weights that the inputs use least")
    peft_start: ClassVar[dict[str, Any]] = {"init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}}

    name: Literal["corda"] = "corda"
    """The method."""

    def prepare(self, config: Any, model: Any, tokenizer: Any) -> Begin:
        """Measure the covariances and start where PEFT does."""
        from peft.tuners.lora.corda import preprocess_corda

        from hiplora.tuner import base_only

        begin = super().prepare(config, model, tokenizer)
        if config.target_modules == "all-linear":  # PEFT's preprocessing takes it for a regular expression
            config.target_modules = list(layer_ranks(config, model))
        with base_only(model):
            preprocess_corda(model, config, self.text(model, tokenizer, batch_size=1).run)
        return begin


class MiloraMethod(ResidualInit):
    """MiLoRA (Wang et al. 2025, arXiv 2406.09044): starts from the r smallest singular values of the weights."""

    title = "MiLoRA"
    summary = SUMMARY.format("the minor part of the base weights")

    name: Literal["milora"] = "milora"
    """The method."""

    def parts(self, ranks: Mapping[str, int], model: Any, tokenizer: Any) -> "Callable[[str, Tensor], Pair]":
        """Return what gives the part of the r smallest singular values."""
        from hiplora.spectral import minor_svd_factors

        return lambda name, weight: minor_svd_factors(weight, ranks[name])


class LoraNullMethod(ResidualInit, FromInputs):
    """LoRA-Null (Tang et al. 2025, arXiv 2503.02659): starts from W N Nᵀ, where N is what the inputs use least.

    This is the variant that trains both factors. N (n, r) are the last r eigenvectors of a layer's input second moment.
    The paper measures it on 256 questions of NQ-open; here text and moment are those of HiP-LoRA's activation basis.
    """

    title = "LoRA-Null"
    summary = SUMMARY.format("the part of the base weights in the directions in which the inputs have least energy")

    name: Literal["lora_null"] = "lora_null"
    """The method."""

    def parts(self, ranks: Mapping[str, int], model: Any, tokenizer: Any) -> "Callable[[str, Tensor], Pair]":
        """Measure the inputs; return what gives W N Nᵀ."""
        from hiplora.spectral import projected_factors

        least = self.text(model, tokenizer).inputs(ranks, trailing=ranks)
        return lambda name, weight: projected_factors(weight, least[name].vectors)


def layer_ranks(config: Any, model: Any) -> dict[str, int]:
    """Return the rank of every layer to adapt; ConfigError if nothing can be subtracted from a weight's type."""
    import torch

    from hiplora.tuner import find_targets, for_module

    ranks, modules = {}, dict(model.named_modules())
    for target in find_targets(model, config):
        if target.name not in modules:
            continue  # an expert of a mixture, which PEFT's LoRA leaves alone
        ranks[target.name] = for_module(config.rank_pattern or {}, target.name, config.r)
        dtype = modules[target.name].weight.dtype
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            why = f"nothing can be subtracted from a weight of type {dtype}"
            raise ConfigError(f"layer {target.name}: {why}; load fp32, bf16 or fp16, or use another method")
    return ranks


def _begin_at(factors: "Callable[[str, Any], Pair]") -> Begin:
    """Start every layer at its factors, in fp32, and subtract their scaled product from its base weight."""
    import torch
    from peft.utils.other import transpose
    from tqdm import tqdm

    @torch.no_grad()
    def begin(adapted: "PeftModel") -> None:
        layers = list(_layers(adapted))
        for name, layer in tqdm(layers, "decomposing", unit=" layers", delay=2, leave=False, disable=None):
            pair = factors(name, layer)
            weight = layer.get_base_layer().weight
            B, A = (factor.to(weight.device, torch.float32).contiguous() for factor in pair)
            layer.lora_A[ADAPTER].weight.data, layer.lora_B[ADAPTER].weight.data = A, B
            part = transpose(layer.scaling[ADAPTER] * B @ A, layer.fan_in_fan_out)
            weight.data = (weight.float() - part).to(weight.dtype)  # a new tensor: others may hold the old one

    return begin


def restored(config: Any, file: Path) -> Begin:
    """Begin at the start kept in a file; `config` is changed so that PEFT does not compute one."""
    from safetensors.torch import load_file

    start = load_file(file)
    config.init_lora_weights, config.corda_config = True, None
    prefix = "base_model.model."
    return _begin_at(lambda name, _: (start[f"{prefix}{name}{B_NAME}"], start[f"{prefix}{name}{A_NAME}"]))


def keep_start(tensors: "Mapping[str, Tensor]", file: Path) -> None:
    """Keep the factors that an adapter starts from, under their names."""
    from safetensors.torch import save

    factors = {name: value.cpu().contiguous() for name, value in tensors.items() if name.endswith((A_NAME, B_NAME))}
    write_atomic(file, save(factors))


def to_difference(folder: Path, start: Path) -> None:
    """Turn an adapter as trained into the plain LoRA of rank 2r on the untouched base; `modules_to_save` stay."""
    import torch
    from peft import PeftConfig
    from safetensors.torch import load_file, save_file

    tensors, origin = load_file(folder / WEIGHTS_FILE), load_file(start / WEIGHTS_FILE)
    for name, value in origin.items():
        dim, sign = (0, 1) if name.endswith(A_NAME) else (1, -1)
        tensors[name] = torch.cat([tensors[name], sign * value.to(tensors[name].dtype)], dim=dim)
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
    config: Any = PeftConfig.from_pretrained(str(folder))
    for field in ("r", "lora_alpha"):  # both, so that the scaling α/r stays
        setattr(config, field, 2 * getattr(config, field))
    for field in ("rank_pattern", "alpha_pattern"):
        setattr(config, field, {name: 2 * value for name, value in (getattr(config, field) or {}).items()})
    config.init_lora_weights, config.corda_config = True, None
    config.save_pretrained(str(folder))


def split_difference(tensors: "Mapping[str, Tensor]") -> "tuple[dict[str, Tensor], dict[str, Tensor]]":
    """Return the tensors of the trained adapter and of its start, which `to_difference` joined."""
    trained, start = dict(tensors), {}
    for name, value in tensors.items():
        if name.endswith((A_NAME, B_NAME)):
            dim, sign = (0, 1) if name.endswith(A_NAME) else (1, -1)
            factor, origin = value.chunk(2, dim=dim)
            trained[name], start[name] = factor.contiguous(), sign * origin
    return trained, start


def _layers(model: "PeftModel") -> Iterator[tuple[str, Any]]:
    """Yield the LoRA layers of a model, under their names in the bare model."""
    from peft.tuners.lora import LoraLayer

    bare: Any = model.get_base_model()
    for name, module in bare.named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A:
            yield name, module
