"""Machines by what they can do: named GPUs from a table, and the record that a measurement fills in."""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from hiplora.errors import ConfigError


@dataclass(frozen=True)
class Machine:
    """What one device of a machine achieves, not what its data sheet promises.

    Attributes:
        name: as it is shown.
        train_flops_per_s: operations of `flops.training` done in a second of training steps.
        forward_flops_per_s: operations of `flops.forward` done in a second of scoring.
        decode_bytes_per_s: weights and cached keys and values read in a second of generating.
        svd_flops_per_s: operations of `svd_load` done in a second.
        memory_bytes: of one device.
        dtype_bytes: size of an element of the weights.
        devices: how many such devices there are; a job uses one of them.
        layer_seconds: least time of one layer in one pass, however little it has to do: Python, kernel launches.
        runtime_bytes: memory that is taken before there is a model: Python and its libraries, a GPU's context.
        tiled_head: whether training never holds whole rows of logits.
        basis: where the numbers come from, in words: shown wherever an estimate is.
    """

    name: str
    train_flops_per_s: float
    forward_flops_per_s: float
    decode_bytes_per_s: float
    svd_flops_per_s: float
    memory_bytes: int
    dtype_bytes: int
    devices: int = 1
    layer_seconds: float = 0.0
    runtime_bytes: int = 0
    tiled_head: bool = False
    basis: str = ""


class _Gpus(Mapping[str, Machine]):
    """The table of named GPUs, read when it is first needed."""

    def __getitem__(self, name: str) -> Machine:
        return _table()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_table())

    def __len__(self) -> int:
        return len(_table())


GPUS: Mapping[str, Machine] = _Gpus()


def gpu(name: str) -> Machine:
    """Return a named GPU.

    Raises:
        ConfigError: there is none of that name; the message lists them.
    """
    try:
        return GPUS[name.lower()]
    except KeyError:
        raise ConfigError(f"GPU {name!r}: is not in the table; expected one of {', '.join(GPUS)}") from None


@functools.cache
def _table() -> dict[str, Machine]:
    text = importlib.resources.files("hiplora.study.estimate").joinpath("gpus.yaml").read_text("utf-8")
    document = yaml.safe_load(text)
    return {name: _machine(name, facts, document["assumed"]) for name, facts in document["gpus"].items()}


def _machine(name: str, facts: Mapping[str, Any], assumed: Mapping[str, Any]) -> Machine:
    peak, bandwidth = facts["half_tflops"] * 1e12, facts["gb_per_s"] * 1e9
    return Machine(
        name=facts["title"],
        train_flops_per_s=peak * assumed["training"],
        forward_flops_per_s=peak * assumed["scoring"],
        decode_bytes_per_s=bandwidth * assumed["decoding"],
        svd_flops_per_s=facts["single_tflops"] * 1e12 * assumed["decompositions"],
        memory_bytes=facts["gib"] << 30,
        dtype_bytes=2,
        layer_seconds=assumed["layer_seconds"],
        runtime_bytes=assumed["context_mib"] << 20,
        tiled_head=True,
        basis=(
            f"data sheet: {facts['half_tflops']:g} TFLOP/s dense in half precision, {facts['gb_per_s']:,} GB/s, "
            f"{facts['gib']} GiB; assumed of that: {assumed['training']:.0%} in training, {assumed['scoring']:.0%} in "
            f"scoring, {assumed['decoding']:.0%} of the bandwidth in generating (with at least "
            f"{1e3 * assumed['layer_seconds']:g} ms a layer and pass), {assumed['decompositions']:.0%} of "
            f"{facts['single_tflops']:g} TFLOP/s in single precision for decompositions; not measured"
        ),
    )
