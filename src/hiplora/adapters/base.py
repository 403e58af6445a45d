"""The base model of an adapter: its configuration and weights, and whether the adapter fits."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import psutil
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hiplora.adapters.update import AdapterUpdate
from hiplora.errors import AdapterError, HipLoraError, first_line
from hiplora.models import quiet_transformers, resolve
from hiplora.spectral import factor_mismatch, weight_fingerprint
from hiplora.tuner import OTHER_PRECISION_LIMIT
from hiplora.tuner.experts import unrolled


def load_base(name: str, dtype: torch.dtype | str) -> PreTrainedModel:
    """Load a base model by folder, hub name or hiplora's own name, in evaluation mode; AdapterError if it cannot."""
    with _readable(name), quiet_transformers(always=False):
        return AutoModelForCausalLM.from_pretrained(resolve(name), dtype=dtype, trust_remote_code=False).eval()


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence library warnings about each other, and about a base model that is not on the hub, inside the block."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message="Unable to fetch remote file|Could not find a config file")
        yield


class BaseWeights:
    """Configuration and weights of a causal language model on disk; the weights are loaded when first asked for."""

    def __init__(self, model: str):
        """Open a model folder or hub name; AdapterError if it cannot be read."""
        self.model = model
        with _readable(model), torch.device("meta"):
            self.config = AutoConfig.from_pretrained(resolve(model), trust_remote_code=False)
            self.skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(self.config, trust_remote_code=False)

    def no_room(self, itemsize: int) -> str:
        """Return why the model cannot be loaded at `itemsize` bytes a parameter, and the way out; empty if it can."""
        configs = self.config, self.config.get_text_config()
        if any(getattr(config, "quantization_config", None) for config in configs):
            return f"base model {self.model} is quantised; name the unquantised model as base=… (--base)"
        needed = itemsize * sum(parameter.numel() for parameter in self.skeleton.parameters())
        if needed > psutil.virtual_memory().available:
            size = f"{needed / 2**30:.0f} GiB"
            return f"base model {self.model} needs {size}, more than is free; use a machine with more memory"
        return ""

    @cached_property
    def whole(self) -> PreTrainedModel:
        """The model, loaded in its own precision; AdapterError if it is quantised or does not fit into memory."""
        if why := self.no_room((self.config.dtype or torch.float32).itemsize):
            raise AdapterError(why)
        return load_base(self.model, "auto")

    def weight(self, module: str) -> Float[Tensor, "m n"]:
        """Return a linear layer's weight as (out, in), as stored; AdapterError if there is no such layer."""
        with unrolled(self.skeleton):
            linear_layer(self.skeleton, module, self.model)
        with unrolled(self.whole):
            return weight_of(self.whole.get_submodule(module))

    def fitting_weight(self, module: str, update: AdapterUpdate) -> Tensor:
        """Return a layer's weight after `check_fit`."""
        return check_fit(self.weight(module), update, module, self.model)


def linear_layer(model: nn.Module, module: str, name: str) -> nn.Module:
    """Return a linear layer of the model that messages call `name`; AdapterError if it has none of that name."""
    layer = dict(model.named_modules()).get(module)
    if not isinstance(layer, (nn.Linear, Conv1D)):
        raise AdapterError(
            f"base model {name}: has no linear layer {module}; the adapter was made for another model: pass the right "
            "one as base=… (--base)"
        )
    return layer


def weight_of(layer: Any) -> Float[Tensor, "m n"]:
    """Return a linear layer's weight as (out, in); GPT-2's `Conv1D` stores it as (in, out)."""
    weight = layer.weight.detach()
    return weight.T if isinstance(layer, Conv1D) else weight


def is_transposed(update: AdapterUpdate, model: nn.Module | None = None) -> bool:
    """Return whether the base model stores weights as (in, out), as far as it is at hand."""
    try:
        model = model or BaseWeights(update.base).skeleton
    except AdapterError:
        return bool(update.config.get("fan_in_fan_out"))
    return any(isinstance(layer, Conv1D) for layer in model.modules())


def is_tied(model: PreTrainedModel) -> bool:
    """Return whether a model's output head shares its weight with the embeddings."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and embeddings is not None and head.weight is embeddings.weight


@torch.no_grad()
def replace_extras(model: PreTrainedModel, update: AdapterUpdate) -> bool:
    """Copy the tensors of `modules_to_save` into a bare model, and return whether its output head was untied.

    The vocabulary is resized as the adapter's embeddings were. The head gets a weight of its own where the adapter
    changes one of two tied weights. AdapterError if a tensor does not fit.
    """
    for name, tensor in update.extras.items():
        old: Any = _parameters(model).get(name)
        layers = model.get_input_embeddings(), model.get_output_embeddings()
        is_vocabulary = old is not None and any(old is getattr(layer, "weight", None) for layer in layers)
        if is_vocabulary and len(tensor) > len(old) and tensor.shape[1:] == old.shape[1:]:
            model.resize_token_embeddings(len(tensor), mean_resizing=False)
    head = model.get_output_embeddings()
    tied = {name for name, one in _parameters(model).items() if is_tied(model) and one is head.weight}
    same = tied <= update.extras.keys() and len({weight_fingerprint(update.extras[name]) for name in tied}) == 1
    untied = not same and bool(tied & {*(f"{module}.weight" for module in update.modules), *update.extras})
    if untied:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
    parameters = _parameters(model)
    for name, tensor in update.extras.items():
        shape = tuple(parameters[name].shape) if name in parameters else "no such parameter"
        if tuple(tensor.shape) != shape:
            raise AdapterError(f"{update.source}: tensor {name} is {tuple(tensor.shape)}, the base model's {shape}")
        parameters[name].copy_(tensor)
    return untied


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return all parameters by name, tied ones under each of their names."""
    return dict(model.named_parameters(remove_duplicate=False))


def check_base(model: nn.Module, update: AdapterUpdate, name: str) -> None:
    """Check that a bare model, called `name` in messages, has every adapted layer, as `check_fit` does."""
    with unrolled(model):
        for module in update.modules:
            check_fit(weight_of(linear_layer(model, module, name)), update, module, name)


def check_fit(weight: Tensor, update: AdapterUpdate, module: str, base: str) -> Tensor:
    """Return a weight (out, in) as the adapter saw it; AdapterError if it is not the one it was made for.

    A weight that was quantised or rounded for training is recognised by the adapter's own singular triplets.
    """
    if tuple(weight.shape) != (expected := update.shape(module)):
        raise AdapterError(
            f"layer {module}: the adapter is for {expected[0]} × {expected[1]}, the weight in {base} is "
            f"{weight.shape[0]} × {weight.shape[1]}; pass the right base model as base=… (--base)"
        )
    if module not in update.fingerprints:
        return weight
    precision, channels = update.config.get("base_precision") or "", update.channels.get(module)
    seen = in_precision(weight, update.fingerprints[module], precision)
    if seen is None and channels is not None and precision not in ("", str(weight.dtype).removeprefix("torch.")):
        basis = update.config.get("basis", "weight")
        mismatch = factor_mismatch(weight.float(), channels.U, channels.sigma, channels.V, basis)
        seen = weight if mismatch <= OTHER_PRECISION_LIMIT else None
    if seen is None:
        raise AdapterError(
            f"layer {module}: the weight in {base} is not the one that this adapter was made for; pass the right base "
            "model as base=… (--base)"
        )
    return seen


def in_precision(weight: Tensor, fingerprint: str, precision: str) -> Tensor | None:
    """Return a stored weight as the adapter saw it, or None if it is not the fingerprinted one.

    An fp32 checkpoint that was loaded in bf16 (`precision`, a dtype's name) is rounded in the same way first.
    """
    dtype = getattr(torch, precision, None) if precision else None
    casts = [weight.dtype, dtype] if isinstance(dtype, torch.dtype) and dtype.is_floating_point else [weight.dtype]
    seen = (weight.to(dtype) for dtype in casts)
    return next((one for one in seen if weight_fingerprint(one) == fingerprint), None)


@contextmanager
def _readable(model: str) -> Iterator[None]:
    if not model:
        raise AdapterError("the adapter names no base model; pass base=… (--base)")
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:  # ImportError: a quantiser's library
        if isinstance(error, HipLoraError):
            raise
        raise AdapterError(
            f"base model {model}: cannot be read ({first_line(error)}); pass a folder or a hub name that this machine "
            "can reach as base=… (--base)"
        ) from error
