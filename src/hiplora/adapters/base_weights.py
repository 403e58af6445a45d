"""The weights of a base model, one at a time: inspecting an 8B model must not load it."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hiplora.adapters.adapter import AdapterUpdate, Update
from hiplora.adapters.shards import INDEX, TensorSpec, read_blocks, read_specs
from hiplora.errors import AdapterError, first_line
from hiplora.models import resolve
from hiplora.models.quiet import quiet_transformers
from hiplora.spectral import misfit, weight_fingerprint
from hiplora.tuner.verify import OTHER_PRECISION_LIMIT

_SINGLE = "model.safetensors"


def load_base(name: str, dtype: torch.dtype | str) -> PreTrainedModel:
    """Load a base model by folder or hub name (or one of hiplora's own names), in evaluation mode.

    Raises:
        AdapterError: there is no such model, or it cannot be read.
    """
    if not name:
        raise AdapterError("the adapter names no base model; pass base=… (--base)")
    with _readable(name), quiet_transformers(always=False):
        return AutoModelForCausalLM.from_pretrained(resolve(name), dtype=dtype).eval()


class BaseWeights:
    """Weights of a causal language model on disk, by module name, read when asked for.

    Modules whose weight is not under its own name in a safetensors file (converted checkpoints), nor tied to one that
    is, are taken from the model loaded as a whole, once.
    """

    def __init__(self, model: str):
        """Open a model folder or hub name (or one of hiplora's own names).

        Raises:
            AdapterError: there is no such model, or it cannot be read.
        """
        if not model:
            raise AdapterError("the adapter names no base model; pass base=… (--base)")
        self.model = model
        self._path = resolve(model)
        with _readable(model), torch.device("meta"):
            self.config = AutoConfig.from_pretrained(self._path)
            self.skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(self.config)
        self._files: Mapping[str, str] | None = None
        self._loaded: nn.Module | None = None

    @property
    def parameters(self) -> int:
        """Number of parameters of the model."""
        return sum(parameter.numel() for parameter in self.skeleton.parameters())

    @property
    def stored(self) -> Mapping[str, TensorSpec]:
        """What is in the model's safetensors files, one after the other; empty where it has none.

        Raises:
            AdapterError: a tensor's number format is not known.
        """
        files = dict.fromkeys(self._index().values())
        return {name: spec for file in files for name, spec in read_specs(file).items()}

    @cached_property
    def tied_head(self) -> tuple[str, str] | None:
        """The parameters of the output head and of the embeddings, if they are one; else None."""
        if not is_tied(self.skeleton):
            return None
        names = {id(module): f"{name}.weight" for name, module in self.skeleton.named_modules()}
        head, embeddings = self.skeleton.get_output_embeddings(), self.skeleton.get_input_embeddings()
        return names[id(head)], names[id(embeddings)]

    def source_of(self, parameter: str) -> str | None:
        """Return the stored tensor that holds a parameter: its own or the one it is tied to; None if there is none."""
        tied = self.tied_head or ()
        names = (parameter, *(tied if parameter in tied else ()))
        return next((name for name in names if name in self._index()), None)

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield a stored tensor as it is in its file, some rows at a time."""
        return read_blocks(self._index()[name], name)

    def file(self, name: str) -> str | None:
        """Return the path of a file beside the weights, or None if the model has none of that name."""
        return _file(self._path, name)

    def is_transposed(self, module: str) -> bool:
        """Tell whether a layer's weight is stored as (in, out), as GPT-2's `Conv1D` does.

        Raises:
            AdapterError: there is no such linear layer.
        """
        return isinstance(linear_layer(self.skeleton, module, self.model), Conv1D)

    def module(self, name: str) -> nn.Module:
        """Return a module of the model without its weights.

        Raises:
            AdapterError: the model has no such module.
        """
        try:
            return self.skeleton.get_submodule(name)
        except AttributeError:
            raise AdapterError(
                f"base model {self.model}: has no layer {name}; the adapter was made for another model: pass the "
                "right one as base=… (--base)"
            ) from None

    def weight(self, name: str) -> Tensor:
        """Return a linear layer's weight as (out, in), as stored, on the CPU.

        Raises:
            AdapterError: there is no such layer, or its weight is not a matrix.
        """
        module = self.module(name)
        weight = self._read(f"{name}.weight")
        if weight.dim() != 2 or not weight.is_floating_point():
            raise AdapterError(
                f"base model {self.model}: the weight of {name} is {weight.dtype} of shape {tuple(weight.shape)}, not "
                "a matrix of floats; name the unquantised model as base=… (--base)"
            )
        return weight.T if isinstance(module, Conv1D) else weight

    def fitting_weight(self, name: str, update: Update) -> Tensor:
        """Return a layer's weight as (out, in), after checking that an adapter fits it by shape and fingerprint.

        Raises:
            AdapterError: as `weight`, or the adapter was made for another weight.
        """
        weight = self.weight(name)
        return check_fit(weight, update, name, self.model)

    def _read(self, key: str) -> Tensor:
        name = self.source_of(key)
        if name is None:
            return self._load().get_parameter(key).detach()
        with safe_open(self._index()[name], framework="pt") as tensors:
            return tensors.get_tensor(name)

    def _index(self) -> Mapping[str, str]:
        """Return parameter name → file, empty where the model is not plain safetensors."""
        if self._files is None:
            self._files = _safetensors_index(self._path)
        return self._files

    def _load(self) -> nn.Module:
        if self._loaded is None:
            self._loaded = load_base(self.model, "auto")
        return self._loaded


def linear_layer(model: nn.Module, module: str, name: str) -> nn.Module:
    """Return a linear layer of a model that is called `name` in messages.

    Raises:
        AdapterError: the model has no such layer, or it is not linear.
    """
    try:
        layer = model.get_submodule(module)
    except AttributeError:
        layer = None
    if not isinstance(layer, (nn.Linear, Conv1D)):
        raise AdapterError(
            f"base model {name}: has no linear layer {module}; the adapter was made for another model: pass the right "
            "one as base=… (--base)"
        )
    return layer


def is_tied(model: PreTrainedModel) -> bool:
    """Tell whether a model's output head has the very weight of its embeddings."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and embeddings is not None and head.weight is embeddings.weight


def check_shape(shape: Sequence[int], update: Update, module: str, base: str) -> None:
    """Check that a weight has the shape (out, in) of an update.

    Raises:
        AdapterError: names the module, both shapes, the base model and the way out.
    """
    expected = update.shape(module)
    if tuple(shape) != expected:
        raise AdapterError(
            f"layer {module}: the adapter is for {expected[0]} × {expected[1]}, the weight in {base} is "
            f"{shape[0]} × {shape[1]}; pass the right base model as base=… (--base)"
        )


def check_fit(weight: Tensor, update: Update, module: str, base: str) -> Tensor:
    """Return a weight (out, in) as the adapter saw it, after checking that it is the one it was made for.

    A weight that was quantised or rounded for training is recognised by the adapter's own singular triplets; it is
    returned as it is.

    Raises:
        AdapterError: other shape or other values; names the module, the base model and the way out.
    """
    check_shape(weight.shape, update, module, base)
    fingerprint, precision = update.fingerprints.get(module), update.config.get("base_precision", "")
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
    off = misfit(weight.float(), channels.U, channels.sigma, channels.V, basis)
    return off <= OTHER_PRECISION_LIMIT


@contextmanager
def _readable(model: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"base model {model}: cannot be read ({first_line(error)}); pass a folder or a hub name that this machine "
            "can reach as base=… (--base)"
        ) from error


def _safetensors_index(path: str) -> dict[str, str]:
    index = _file(path, INDEX)
    if index is not None:
        names = json.loads(Path(index).read_text())["weight_map"]
        found = {file: _file(path, file) for file in sorted(set(names.values()))}
        files = {file: whole for file, whole in found.items() if whole is not None}
        return {name: files[file] for name, file in names.items()} if len(files) == len(found) else {}
    single = _file(path, _SINGLE)
    if single is None:
        return {}
    return dict.fromkeys(read_specs(single), single)


def _file(path: str, name: str) -> str | None:
    """Return a file of a local model folder or of the hub, or None where it has none of that name."""
    if os.path.isdir(path):
        local = os.path.join(path, name)
        return local if os.path.isfile(local) else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return hf_hub_download(path, name)
    except EntryNotFoundError:  # and its child for a file that the offline cache does not have
        return None
