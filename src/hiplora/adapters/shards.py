"""Safetensors files written tensor by tensor, block of rows by block: a checkpoint need not fit into memory."""

import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hiplora.errors import AdapterError, ConfigError
from hiplora.files import write_atomic

INDEX = "model.safetensors.index.json"
_PATTERN = "model{suffix}.safetensors"
_BLOCK = 1 << 20  # numbers that are in memory at a time
_SIZE = re.compile(r"\s*\d+(\.\d+)?\s*[KMGT]B\s*", re.IGNORECASE)
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

Blocks = Callable[[str], Iterable[Tensor]]
Wrap = Callable[[Iterable[str]], Iterable[str]]


@dataclass(frozen=True)
class TensorSpec:
    """Shape and number format of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_specs(file: str | Path) -> dict[str, TensorSpec]:
    """Return what is in a safetensors file, by name; no tensor is read.

    Raises:
        AdapterError: the file is damaged, or a tensor has a number format that torch has not.
    """
    specs = {}
    with _opened(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a mapping
            stored = tensors.get_slice(name)
            if stored.get_dtype() not in _DTYPES:
                raise AdapterError(
                    f"{file}: tensor {name} is stored as {stored.get_dtype()}, which is not known"
                )
            specs[name] = TensorSpec(tuple(stored.get_shape()), _DTYPES[stored.get_dtype()])
    return specs


def read_blocks(file: str | Path, name: str) -> Iterator[Tensor]:
    """Yield a tensor of a safetensors file, some rows at a time."""
    with _opened(file) as tensors:
        stored = tensors.get_slice(name)
        if not stored.get_shape():
            yield tensors.get_tensor(name)
            return
        for rows in row_blocks(stored.get_shape()):
            yield stored[rows]


@contextmanager
def _opened(file: str | Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise AdapterError(f"{file}: damaged or cut off ({error}); copy or download it again") from error


def row_blocks(shape: Sequence[int], copies: int = 1) -> Iterator[slice]:
    """Yield slices of a tensor's first dimension so that `copies` of each hold 2²⁰ numbers at most, or one row each."""
    step = max(1, _BLOCK // max(1, copies * math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def check_shard_size(size: int | str) -> None:
    """Refuse what is no size of a file: a number of bytes, or a number with a unit.

    Raises:
        ConfigError: naming the value.
    """
    if not (isinstance(size, int) and size > 0) and not (isinstance(size, str) and _SIZE.fullmatch(size)):
        raise ConfigError(f"max_shard_size is {size!r}; expected a size, as 5GB or 500MB (--max-shard-size)")


def write_shards(
    folder: Path,
    specs: Mapping[str, TensorSpec],
    blocks: Blocks,
    max_shard_size: int | str = "5GB",
    wrap: Wrap = iter,
) -> list[str]:
    """Write tensors as `model.safetensors`, or as several files and their index; return the files' names.

    Every file is read back once it is complete, by safetensors itself.

    Args:
        folder: an existing folder.
        specs: what is written, by name, in the order of writing.
        blocks: yields the values of the tensor of a name, in order, in its number format.
        max_shard_size: largest size of a file; a larger tensor gets a file of its own.
        wrap: called with the names, yields them; for a progress bar.

    Raises:
        AdapterError: a file does not read back as it was written.
        ConfigError: `max_shard_size` is no size.
    """
    check_shard_size(max_shard_size)
    split: Any = split_state_dict_into_shards_factory(
        dict(specs),
        get_storage_size=lambda spec: spec.nbytes,
        filename_pattern=_PATTERN,
        max_shard_size=max_shard_size,
    )
    files = {file: _aligned(names, specs) for file, names in split.filename_to_tensors.items()}
    steps = iter(wrap([name for names in files.values() for name in names]))
    for file, names in files.items():
        chosen = {name: specs[name] for name in names}
        check_file(folder / file, write_file(folder / file, chosen, blocks, islice(steps, len(names))))
    next(steps, None)  # lets a progress bar end
    if len(files) > 1:
        index = {name: file for file, names in files.items() for name in names}
        text = json.dumps({"metadata": split.metadata, "weight_map": index}, indent=2, sort_keys=True)
        write_atomic(folder / INDEX, text + "\n")
    return list(files)


def write_file(
    path: Path, specs: Mapping[str, TensorSpec], blocks: Blocks, names: Iterable[str] | None = None
) -> dict[str, int]:
    """Write one safetensors file, holding one block of one tensor at a time; return a checksum of each tensor.

    `names` are those of `specs`, in their order, for a caller that follows the progress.

    Raises:
        ValueError: the blocks of a tensor are not what its spec says.
    """
    sums = {}
    with path.open("wb") as file:
        file.write(_header(specs))
        for name in specs if names is None else names:
            sums[name] = _write_tensor(file, name, specs[name], blocks(name))
    return sums


def check_file(path: Path, sums: Mapping[str, int]) -> None:
    """Read a file back and compare every tensor's bytes with what was written.

    Raises:
        AdapterError: naming the file, the tensor and the way out.
    """
    for name, expected in sums.items():
        found = 0
        for block in read_blocks(path, name):
            found = zlib.crc32(_bytes(block), found)
        if found != expected:
            raise AdapterError(
                f"{path}: tensor {name} does not read back as it was written; nothing was exported: check the disk"
            )


def _header(specs: Mapping[str, TensorSpec]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, spec in specs.items():
        end = start + spec.nbytes
        entries[name] = {"dtype": _NAMES[spec.dtype], "shape": spec.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(file: BinaryIO, name: str, spec: TensorSpec, blocks: Iterable[Tensor]) -> int:
    checksum, written = 0, 0
    for block in blocks:
        if block.dtype != spec.dtype:
            raise ValueError(f"tensor {name}: a block is {block.dtype}, expected {spec.dtype}")
        data = _bytes(block)
        file.write(data)
        checksum = zlib.crc32(data, checksum)
        written += data.nbytes
    if written != spec.nbytes:
        raise ValueError(f"tensor {name}: got {written} bytes, expected {spec.nbytes}")
    return checksum


def _bytes(block: Tensor) -> memoryview:
    return block.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _aligned(names: Iterable[str], specs: Mapping[str, TensorSpec]) -> list[str]:
    """Put tensors of wide numbers first, as safetensors does, so that each starts at a multiple of its width."""
    return sorted(names, key=lambda name: -specs[name].dtype.itemsize)
