"""A base checkpoint with an update added to it, written as it is read: never more than one module's update at once."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from hiplora.adapters.adapter import Update
from hiplora.adapters.base_weights import check_shape
from hiplora.adapters.check import MergeCheck
from hiplora.adapters.shards import TensorSpec, row_blocks
from hiplora.errors import AdapterError


class Checkpoint(Protocol):
    """Base weights that are read some rows at a time; `BaseWeights` is one, and says what each of these means."""

    model: str

    @property
    def stored(self) -> Mapping[str, TensorSpec]:
        """What is stored, by name."""
        ...

    @property
    def tied_head(self) -> tuple[str, str] | None:
        """The parameters of the output head and of the embeddings, if they are one."""
        ...

    def source_of(self, parameter: str) -> str | None:
        """Return the stored tensor that holds a parameter."""
        ...

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield a stored tensor, some rows at a time."""
        ...

    def is_transposed(self, module: str) -> bool:
        """Tell whether a layer's weight is stored as (in, out)."""
        ...

    def fitting_weight(self, name: str, update: Update) -> Tensor:
        """Return a layer's weight after checking that it is the one of the update's fingerprint."""
        ...


def obstacle(base: Checkpoint, update: Update) -> str:
    """Return why a merge cannot be streamed, or nothing if it can."""
    if not base.stored:
        return "it is not stored as safetensors"
    for name in _changed(update):
        if base.source_of(name) is None:
            return f"its files have no tensor {name}"
    return ""


def _changed(update: Update) -> list[str]:
    return [*(f"{module}.weight" for module in update.modules), *update.extras]


class MergedTensors:
    """The tensors of a merged model, computed one block of rows at a time.

    `specs` says what they are, by name, in the order of the base model's files; `blocks` computes one; `differences`
    has, of each adapted module that was computed, how far it is from the base weight plus the update
    (`MergeCheck.difference`). `untied` says that the output head has become a tensor of its own.
    """

    def __init__(self, base: Checkpoint, update: Update, dtype: torch.dtype | None = None):
        """Plan the merge; `dtype` is that of all floating-point tensors, None keeps what is stored.

        Raises:
            AdapterError: a weight or a saved tensor has another shape than the base model's.
        """
        self._base, self._update = base, update
        self._modules = {f"{module}.weight": module for module in update.modules}
        stored = base.stored
        self._sources = {name: name for name in stored}
        tied = base.tied_head or ()
        self.untied = bool(set(tied) & set(_changed(update)))
        if self.untied:
            self._sources |= {name: source for name in tied if (source := base.source_of(name))}
        self.specs = {name: _in_dtype(stored[source], dtype) for name, source in self._sources.items()}
        self.differences: dict[str, float] = {}
        self._check_shapes()

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield the values of a tensor, some rows at a time.

        Raises:
            AdapterError: a base weight is not the one that the adapter was made for, a value overflows the number
                format, or the sum is wrong.
        """
        spec, module = self.specs[name], self._modules.get(name)
        if module is not None:
            yield from self._merged(module, spec.dtype)
            return
        extra = self._update.extras.get(name)
        for block in self._base.blocks(self._sources[name]) if extra is None else _split(extra):
            yield rounded(block, spec.dtype, f"tensor {name}")

    def _merged(self, module: str, dtype: torch.dtype) -> Iterator[Tensor]:
        if module in self._update.fingerprints:
            self._base.fitting_weight(module, self._update)
        check = MergeCheck(self._update, module, self._base.is_transposed(module))
        yield from merged_blocks(
            self._update, check, self._base.blocks(self._sources[f"{module}.weight"]), dtype
        )
        self.differences[module] = check.difference

    def _check_shapes(self) -> None:
        for name, module in self._modules.items():
            shape = self.specs[name].shape
            oriented = shape[::-1] if self._base.is_transposed(module) else shape
            check_shape(oriented, self._update, module, self._base.model)
        for name, tensor in self._update.extras.items():
            check_extra(name, tensor, self.specs[name].shape, self._update.source)


def merged_blocks(
    update: Update, check: MergeCheck, blocks: Iterable[Tensor], dtype: torch.dtype
) -> Iterator[Tensor]:
    """Yield a module's weight with its update added in fp32, then rounded to `dtype`, in blocks as those of `blocks`.

    Raises:
        AdapterError: a value overflows the number format, or the sum is wrong.
    """
    delta = update.delta(check.module)
    if check.transposed:
        delta = delta.T
    row = 0
    for weight in blocks:
        change = delta[row : row + len(weight)]
        merged = weight.float() + change
        written = rounded(merged, dtype, f"layer {check.module}: the merged weight")
        check.add(weight, change, merged, written)
        yield written
        row += len(weight)
    check.refuse()


def rounded(block: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """Return a block in a number format.

    Raises:
        AdapterError: a finite value of `what` overflows it.
    """
    found = block.to(dtype)
    # A sum is finite only if all values are, and quicker to come by than the answer for each of them.
    if dtype == block.dtype or found.sum(dtype=torch.float64).isfinite():
        return found
    if not torch.isfinite(found).all() and torch.isfinite(block).all():
        raise AdapterError(f"{what} overflows {str(dtype).removeprefix('torch.')}; pass --dtype float32")
    return found


def check_extra(name: str, tensor: Tensor, shape: tuple[int, ...], source: str) -> None:
    """Check that a tensor that replaces a parameter of the base model has its shape.

    Raises:
        AdapterError: names the tensor, both shapes and the way out.
    """
    if tuple(tensor.shape) != tuple(shape):
        raise AdapterError(
            f"{source}: tensor {name} is {tuple(tensor.shape)}, the base model's {tuple(shape)}; "
            "a vocabulary that was resized for training must be resized in the base model first"
        )


def _in_dtype(spec: TensorSpec, dtype: torch.dtype | None) -> TensorSpec:
    return spec if dtype is None or not spec.dtype.is_floating_point else replace(spec, dtype=dtype)


def _split(tensor: Tensor) -> Iterator[Tensor]:
    if tensor.dim():
        yield from (tensor[rows] for rows in row_blocks(tensor.shape))
    else:
        yield tensor
