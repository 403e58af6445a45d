"""Adapters that move the base weights at their start: the start kept, put back, and taken off what was trained.

A start is a pair of factors A₀ (r, n), B₀ (m, r) for each layer. The base weight W becomes W − s·B₀A₀, with LoRA's
scaling s, and the adapter begins at A₀, B₀: together they are W, to rounding of W's type. What is trained, A and B, is
saved as the difference on the untouched base: a plain LoRA of rank 2r with factors [A; A₀] and [B, −B₀] at the same s.
So of its 2r rows and columns the first r are the trained ones, the last r those of the start, B₀ with its sign turned.

PEFT's own conversion is not used: it knows only its own methods, leaves out `modules_to_save`, and scales wrongly where
rsLoRA meets a pattern of ranks or alphas.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.other import transpose
from safetensors.torch import load_file, save_file
from torch import Tensor

from hiplora.errors import ConfigError
from hiplora.training.adapters import ADAPTER, WEIGHTS_FILE, save_adapter
from hiplora.training.checkpoints import staged

_A, _B = ".lora_A.weight", ".lora_B.weight"


def layers(model: PeftModel) -> Iterator[tuple[str, Any]]:
    """Go through the LoRA layers of a model: name in the model that has no adapter, layer."""
    bare: Any = model.get_base_model()
    for name, module in bare.named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A:
            yield name, module


@torch.no_grad()
def move_base(layer: Any, B: Tensor, A: Tensor) -> None:
    """Start a LoRA layer at the factors B (m, r), A (r, n), and take their scaled product out of its base weight."""
    base = layer.get_base_layer()
    weight = base.weight
    A, B = (factor.to(weight.device, torch.float32).contiguous() for factor in (A, B))
    layer.lora_A[ADAPTER].weight.data, layer.lora_B[ADAPTER].weight.data = A, B
    part = transpose(layer.scaling[ADAPTER] * B @ A, layer.fan_in_fan_out)
    weight.data = (weight.float() - part).to(weight.dtype)  # a new tensor: who holds the old one has the base


def save_start(model: PeftModel, folder: Path) -> None:
    """Keep the factors that a model starts from, before anything is trained."""
    state = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    tensors = {name: value.cpu().contiguous() for name, value in state.items() if name.endswith((_A, _B))}
    with staged(folder) as aside:
        save_file(tensors, aside / WEIGHTS_FILE, {"format": "pt"})


def restore_start(model: PeftModel, folder: Path) -> None:
    """Bring a model with a new adapter to the start that `save_start` kept; nothing is computed again.

    Raises:
        ConfigError: as `take_start`.
    """
    take_start(model, load_file(folder / WEIGHTS_FILE))


def take_start(model: PeftModel, start: Mapping[str, Tensor]) -> None:
    """Bring a model with a new adapter and an untouched base to a start, given under an adapter's names.

    Raises:
        ConfigError: the start is that of other layers.
    """
    for name, layer in layers(model):
        names = {kind: f"base_model.model.{name}{kind}" for kind in (_A, _B)}
        shapes = {_A: layer.lora_A[ADAPTER].weight.shape, _B: layer.lora_B[ADAPTER].weight.shape}
        for kind, shape in shapes.items():
            found = start[names[kind]].shape if names[kind] in start else None
            if found != shape:
                raise ConfigError(
                    f"the start of the adapter has {'no' if found is None else tuple(found)} {names[kind]}, and the "
                    f"model needs {tuple(shape)}; it was made for another model or other modules"
                )
        move_base(layer, start[names[_B]], start[names[_A]])


def save_difference(model: PeftModel, folder: Path, start: Path) -> None:
    """Save a trained adapter as the plain LoRA of rank 2r that brings the untouched base to the trained model.

    Modules that are trained in full are saved as they are.
    """
    save_adapter(model, folder)
    trained, origin = load_file(folder / WEIGHTS_FILE), load_file(start / WEIGHTS_FILE)
    save_file(
        {name: _beside(name, value, origin) for name, value in trained.items()},
        folder / WEIGHTS_FILE,
        {"format": "pt"},
    )
    config: Any = PeftConfig.from_pretrained(str(folder))
    _double(config)
    config.save_pretrained(str(folder))


def split_difference(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what `save_difference` put together: the tensors of the trained adapter, and those of its start."""
    trained, start = dict(tensors), {}
    for name, value in tensors.items():
        if name.endswith(_A):
            trained[name], start[name] = value.chunk(2, dim=0)
        elif name.endswith(_B):
            trained[name], negated = value.chunk(2, dim=1)
            start[name] = -negated
    return {name: value.contiguous() for name, value in trained.items()}, start


def _beside(name: str, trained: Tensor, start: Mapping[str, Tensor]) -> Tensor:
    if name.endswith(_A):
        return torch.cat([trained, start[name].to(trained.dtype)], dim=0)
    if name.endswith(_B):
        return torch.cat([trained, -start[name].to(trained.dtype)], dim=1)
    return trained


def _double(config: LoraConfig) -> None:
    """Give a configuration twice the rank at the same scaling, which is α/r, or α/√r with rsLoRA."""
    times = 2**0.5 if config.use_rslora else 2
    config.r *= 2
    config.rank_pattern = {name: 2 * rank for name, rank in (config.rank_pattern or {}).items()}
    config.lora_alpha *= times  # type: ignore[assignment]
    config.alpha_pattern = {name: times * alpha for name, alpha in (config.alpha_pattern or {}).items()}
    config.init_lora_weights, config.corda_config = True, None
