"""Methods that start LoRA at a part of the base weight and subtract that part from it.

A start is a pair of factors A₀ (r, n), B₀ (m, r) a layer. The base weight W becomes W − s·B₀A₀, with LoRA's scaling s,
and the adapter begins at A₀, B₀: together they are W, to rounding. The trained A and B are saved as the difference from
the untouched base, a plain LoRA of rank 2r with the factors [A; A₀] and [B, −B₀] at the same s.

None of the papers has s in its formulas. As in PEFT's PiSSA the factors are divided by √s, so that the model begins as
the base model at every `lora_alpha`. PEFT's own conversion is not used: it knows only its own methods and leaves out
`modules_to_save`.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hiplora.errors import ConfigError
from hiplora.files import write_atomic
from hiplora.training.method import ADAPTER, WEIGHTS_FILE, Begin, LowRank

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor

A_NAME, B_NAME = ".lora_A.weight", ".lora_B.weight"


class ResidualInit(LowRank):
    """Base of the methods that start at a part of the weights."""

    moves_base: ClassVar[bool] = True
    peft_start: ClassVar[dict[str, Any]] = {}
    not_of_peft: ClassVar[tuple[str, ...]] = ("name", "calibration_text", "calibration_tokens")

    def peft_config(self, steps: int | None = None) -> "PeftConfig":
        """Return a LoRA configuration, with PEFT's own start where PEFT has it."""
        from peft import LoraConfig

        return LoraConfig(task_type="CAUSAL_LM", **self.peft_start, **self.settings())

    def trained_tensors(self, tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
        """Return the trained half of a saved difference; the base begins at the other half already."""
        return split_difference(tensors)[0]


def layer_ranks(config: Any, model: Any) -> dict[str, int]:
    """Return the rank of every layer to adapt.

    Raises:
        ConfigError: a rank exceeds the weight, or the weight has a type from which nothing can be subtracted.
    """
    import torch

    from hiplora.tuner import find_targets, for_module

    ranks = {}
    for target in find_targets(model, config):
        r = ranks[target.name] = for_module(config.rank_pattern or {}, target.name, config.r)
        dtype = model.get_submodule(target.name).weight.dtype
        if r > min(target.shape):
            raise ConfigError(
                f"layer {target.name}: r {r} exceeds min(out, in) = {min(target.shape)}; lower r or set rank_pattern"
            )
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ConfigError(
                f"layer {target.name}: nothing can be subtracted from a weight of type {dtype}; load the model in "
                "fp32, bf16 or fp16, or use another method"
            )
    return ranks


def begin_as_peft(model: Any, ranks: Mapping[str, int]) -> Begin:
    """Begin where PEFT's initialisation does, but subtract the factors as they are: PEFT rounds them afterwards."""
    before = {name: model.get_submodule(name).weight.data for name in ranks}

    def begin(adapted: "PeftModel") -> None:
        for name, layer in _layers(adapted):
            layer.get_base_layer().weight.data = before[name]
            _move(layer, layer.lora_B[ADAPTER].weight.data, layer.lora_A[ADAPTER].weight.data)

    return begin


def begin_at(part: "Callable[[str, Tensor], tuple[Tensor, Tensor]]") -> Begin:
    """Begin at factors (B, A) of a part of each weight: `part(name, weight)`."""
    from peft.utils.other import transpose
    from tqdm import tqdm

    def begin(adapted: "PeftModel") -> None:
        found = list(_layers(adapted))
        for name, layer in tqdm(found, "decomposing", unit=" layers", delay=2, leave=False, disable=None):
            B, A = part(name, transpose(layer.get_base_layer().weight.detach(), layer.fan_in_fan_out))
            root = layer.scaling[ADAPTER] ** 0.5
            _move(layer, B / root, A / root)

    return begin


def save_start(model: "PeftModel", folder: Path) -> None:
    """Keep the factors that an adapter starts from, under their names; the file is whole or absent."""
    from peft import get_peft_model_state_dict

    _write(get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False), folder)


def keep_start(given: Path, folder: Path) -> None:
    """Keep the start of a saved adapter for a training that carries it on."""
    from safetensors.torch import load_file

    _write(split_difference(load_file(given / WEIGHTS_FILE))[1], folder)


def _write(tensors: "Mapping[str, Tensor]", folder: Path) -> None:
    from safetensors.torch import save

    kept = {name: value.cpu().contiguous() for name, value in tensors.items() if name.endswith((A_NAME, B_NAME))}
    write_atomic(folder / WEIGHTS_FILE, save(kept))


def restored(config: Any, folder: Path) -> Begin:
    """Begin at the start in a folder; `config` is changed so that PEFT computes none."""
    from safetensors.torch import load_file

    start = load_file(folder / WEIGHTS_FILE)
    config.init_lora_weights, config.corda_config = True, None

    def begin(adapted: "PeftModel") -> None:
        for name, layer in _layers(adapted):
            A, B = (start[f"base_model.model.{name}{kind}"] for kind in (A_NAME, B_NAME))
            _move(layer, B, A)

    return begin


def to_difference(folder: Path, start: Path) -> None:
    """Turn an adapter as trained into the plain LoRA of rank 2r on the untouched base; `modules_to_save` stay."""
    import torch
    from peft import PeftConfig
    from safetensors.torch import load_file, save_file

    tensors, origin = load_file(folder / WEIGHTS_FILE), load_file(start / WEIGHTS_FILE)
    for name, trained in tensors.items():
        if name.endswith(A_NAME):
            tensors[name] = torch.cat([trained, origin[name].to(trained.dtype)], dim=0)
        elif name.endswith(B_NAME):
            tensors[name] = torch.cat([trained, -origin[name].to(trained.dtype)], dim=1)
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
    config: Any = PeftConfig.from_pretrained(str(folder))
    config.r *= 2  # and α with it: the scaling α/r stays
    config.lora_alpha *= 2
    config.rank_pattern = {name: 2 * rank for name, rank in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {name: 2 * alpha for name, alpha in (config.alpha_pattern or {}).items()}
    config.init_lora_weights, config.corda_config = True, None
    config.save_pretrained(str(folder))


def split_difference(tensors: "Mapping[str, Tensor]") -> "tuple[dict[str, Tensor], dict[str, Tensor]]":
    """Return the tensors of the trained adapter and of its start, which `save_difference` put together."""
    trained, start = dict(tensors), {}
    for name, value in tensors.items():
        if name.endswith(A_NAME):
            trained[name], start[name] = value.chunk(2, dim=0)
        elif name.endswith(B_NAME):
            trained[name], negated = value.chunk(2, dim=1)
            start[name] = -negated
    return {name: value.contiguous() for name, value in trained.items()}, start


def _layers(model: "PeftModel") -> Iterator[tuple[str, Any]]:
    """Yield the LoRA layers of a model, under their names in the bare model."""
    from peft.tuners.lora import LoraLayer

    bare: Any = model.get_base_model()
    for name, module in bare.named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A:
            yield name, module


def _move(layer: Any, B: "Tensor", A: "Tensor") -> None:
    """Start a layer at the factors B (m, r), A (r, n) and subtract their scaled product from its base weight."""
    import torch
    from peft.utils.other import transpose

    with torch.no_grad():
        weight = layer.get_base_layer().weight
        A, B = (factor.to(weight.device, torch.float32).contiguous() for factor in (A, B))
        layer.lora_A[ADAPTER].weight.data, layer.lora_B[ADAPTER].weight.data = A, B
        part = transpose(layer.scaling[ADAPTER] * B @ A, layer.fan_in_fan_out)
        weight.data = (weight.float() - part).to(weight.dtype)  # a new tensor: others may hold the old one
