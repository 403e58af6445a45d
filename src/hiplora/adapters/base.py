"""The base model of an adapter: weights read one at a time, the model as a whole, and whether the adapter fits."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from hiplora.adapters.update import AdapterUpdate, Update
from hiplora.errors import AdapterError, HipLoraError, first_line
from hiplora.models import quiet_transformers, resolve
from hiplora.spectral import factor_mismatch, weight_fingerprint
from hiplora.tuner import OTHER_PRECISION_LIMIT


def load_base(name: str, dtype: torch.dtype | str) -> PreTrainedModel:
    """Load a base model by folder or hub name (or one of hiplora's own names), in evaluation mode.

    Raises:
        AdapterError: there is no such model, or it cannot be read.
    """
    with _readable(name), quiet_transformers(always=False):
        return AutoModelForCausalLM.from_pretrained(resolve(name), dtype=dtype).eval()


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence library warnings about each other, and about a base model that is not on the hub, inside the block."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message="Unable to fetch remote file|Could not find a config file")
        yield


class BaseWeights:
    """Weights of a causal language model on disk, by module name, each read from its file when asked for.

    A weight that is not under its own name in a safetensors file (a converted checkpoint), nor under the one that it
    is tied to, is taken from the model loaded as a whole, once.
    """

    def __init__(self, model: str):
        """Open a model folder or hub name; AdapterError if it cannot be read."""
        self.model = model
        with _readable(model), torch.device("meta"):
            self._path = resolve(model)
            self.config = AutoConfig.from_pretrained(self._path)
            self.skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(self.config)

    @property
    def parameters(self) -> int:
        """Number of parameters of the model."""
        return sum(parameter.numel() for parameter in self.skeleton.parameters())

    def is_transposed(self, module: str) -> bool:
        """Return whether a layer stores its weight as (in, out), as GPT-2's `Conv1D` does."""
        return isinstance(linear_layer(self.skeleton, module, self.model), Conv1D)

    def weight(self, module: str) -> Float[Tensor, "m n"]:
        """Return a linear layer's weight as (out, in), as stored, on the CPU.

        Raises:
            AdapterError: there is no such layer, or its weight is not a matrix of floats.
        """
        transposed, weight = self.is_transposed(module), self._read(module)
        if weight.dim() != 2 or not weight.is_floating_point():
            raise AdapterError(
                f"base model {self.model}: the weight of {module} is {weight.dtype} of shape {tuple(weight.shape)}, "
                "not a matrix of floats; name the unquantised model as base=… (--base)"
            )
        return weight.T if transposed else weight

    def fitting_weight(self, module: str, update: Update) -> Tensor:
        """Return a layer's weight after `check_fit`."""
        return check_fit(self.weight(module), update, module, self.model)

    def _read(self, module: str) -> Tensor:
        names = [module]
        if is_tied(self.skeleton):
            tied = self.skeleton.get_output_embeddings(), self.skeleton.get_input_embeddings()
            found = [name for name, layer in self.skeleton.named_modules() if layer in tied]
            names += found if module in found else []
        stored = next((f"{name}.weight" for name in names if f"{name}.weight" in self._files), None)
        if stored is None:
            return self._whole.get_parameter(f"{module}.weight").detach()
        with _readable(self.model), safe_open(self._files[stored], framework="pt") as tensors:
            return tensors.get_tensor(stored)

    @cached_property
    def _whole(self) -> nn.Module:
        return load_base(self.model, "auto")

    @cached_property
    def _files(self) -> dict[str, str]:
        """Stored tensor → file; empty where the model is not in safetensors files."""
        with _readable(self.model):
            if index := self._file(SAFE_WEIGHTS_INDEX_NAME):
                names = json.loads(Path(index).read_text())["weight_map"]
                paths = {file: self._file(file) for file in set(names.values())}
                return {name: path for name, file in names.items() if (path := paths[file])}
            if single := self._file(SAFE_WEIGHTS_NAME):
                with safe_open(single, framework="pt") as tensors:
                    return dict.fromkeys(tensors.keys(), single)
            return {}

    def _file(self, name: str) -> str | None:
        return cached_file(self._path, name, _raise_exceptions_for_missing_entries=False)


def linear_layer(model: nn.Module, module: str, name: str) -> nn.Module:
    """Return a linear layer of the model that messages call `name`; AdapterError if it has none of that name."""
    layer = dict(model.named_modules()).get(module)
    if not isinstance(layer, (nn.Linear, Conv1D)):
        raise AdapterError(
            f"base model {name}: has no linear layer {module}; the adapter was made for another model: pass the right "
            "one as base=… (--base)"
        )
    return layer


def is_tied(model: PreTrainedModel) -> bool:
    """Return whether a model's output head shares its weight with the embeddings."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and embeddings is not None and head.weight is embeddings.weight


def is_transposed(update: Update, model: nn.Module | None = None) -> bool:
    """Return whether the adapted layers store their weights as (in, out), as far as the base model is at hand."""
    if model is not None:
        layers = (getattr(module, "base_layer", module) for module in model.modules())
        return any(isinstance(layer, Conv1D) for layer in layers)
    try:
        weights = BaseWeights(update.base)
        return any(weights.is_transposed(module) for module in update.modules)
    except AdapterError:
        return bool(update.config.get("fan_in_fan_out"))


def check_base(model: nn.Module, update: Update, name: str) -> None:
    """Check that a bare model, called `name` in messages, has every adapted layer, as `check_fit` does."""
    for module in update.modules:
        layer = linear_layer(model, module, name)
        weight = layer.get_parameter("weight").detach()
        check_fit(weight.T if isinstance(layer, Conv1D) else weight, update, module, name)


def check_fit(weight: Tensor, update: Update, module: str, base: str) -> Tensor:
    """Return a weight (out, in) as the adapter saw it, after checking that it is the one it was made for.

    A weight that was quantised or rounded for training is recognised by the adapter's own singular triplets; it is
    returned as it is.

    Raises:
        AdapterError: other shape or other values; names the module, the base model and the way out.
    """
    if tuple(weight.shape) != (expected := update.shape(module)):
        raise AdapterError(
            f"layer {module}: the adapter is for {expected[0]} × {expected[1]}, the weight in {base} is "
            f"{weight.shape[0]} × {weight.shape[1]}; pass the right base model as base=… (--base)"
        )
    fingerprint, precision = update.fingerprints.get(module), update.config.get("base_precision") or ""
    if fingerprint is None:
        return weight
    seen = in_precision(weight, fingerprint, precision)
    if seen is None and not _same_but_for_precision(weight, update, module, precision):
        raise AdapterError(
            f"layer {module}: the weight in {base} is not the one that this adapter was made for; pass the right base "
            "model as base=… (--base)"
        )
    return weight if seen is None else seen


def in_precision(weight: Tensor, fingerprint: str, precision: str) -> Tensor | None:
    """Return a stored weight as the adapter saw it, or None if it is not the fingerprinted one.

    A bf16 checkpoint that was loaded in fp32 keeps its values, and its fingerprint; an fp32 checkpoint that was
    loaded in bf16 (`precision`, a dtype's name) is rounded in the same way first.
    """
    if weight_fingerprint(weight) == fingerprint:
        return weight
    dtype = getattr(torch, precision, None) if precision else None
    if not isinstance(dtype, torch.dtype) or dtype == weight.dtype or not dtype.is_floating_point:
        return None
    rounded = weight.to(dtype)
    return rounded if weight_fingerprint(rounded) == fingerprint else None


def _same_but_for_precision(weight: Tensor, update: Update, module: str, precision: str) -> bool:
    channels = update.channels.get(module) if isinstance(update, AdapterUpdate) else None
    if channels is None or precision in ("", str(weight.dtype).removeprefix("torch.")):
        return False
    basis = update.config.get("basis", "weight")
    mismatch = factor_mismatch(weight.float(), channels.U, channels.sigma, channels.V, basis)
    return mismatch <= OTHER_PRECISION_LIMIT


@contextmanager
def _readable(model: str) -> Iterator[None]:
    if not model:
        raise AdapterError("the adapter names no base model; pass base=… (--base)")
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, HipLoraError):
            raise
        raise AdapterError(
            f"base model {model}: cannot be read ({first_line(error)}); pass a folder or a hub name that this machine "
            "can reach as base=… (--base)"
        ) from error
