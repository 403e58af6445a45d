"""Compute docs/scaling.csv, what larger models take, from their shapes: `python -m tools.scaling`."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).resolve().parents[1] / "docs" / "scaling.csv"
R, K, TOKENS, GRADIENT_TOKENS, KEPT = 16, 32, 10_240, 4096, 2048


class Shape(NamedTuple):
    """A Llama: parameters, layers, hidden and MLP width, width of keys and values."""

    parameters: float
    layers: int
    hidden: int
    mlp: int
    keys: int


SHAPES = {
    "8B": Shape(8.03e9, 32, 4096, 14336, 1024),
    "70B": Shape(70.6e9, 80, 8192, 28672, 1024),
    "405B": Shape(405.9e9, 126, 16384, 53248, 1024),
}


def mlp_modules(shape: Shape) -> list[tuple[int, int]]:
    """Return the (out, in) of the modules that the default preset adapts."""
    return [(shape.mlp, shape.hidden), (shape.mlp, shape.hidden), (shape.hidden, shape.mlp)] * shape.layers


def attention_modules(shape: Shape) -> list[tuple[int, int]]:
    """Return the (out, in) of the modules that the paper's preset adapts."""
    h, keys = shape.hidden, shape.keys
    return [(h, h), (keys, h), (keys, h), (h, h)] * shape.layers


def factor_bytes(modules: list[tuple[int, int]], k: int = K) -> int:
    """Return the size of U, σ and V, fp32."""
    return sum(4 * k * (m + n + 1) for m, n in modules)


def adapter_bytes(modules: list[tuple[int, int]], r: int = R) -> int:
    """Return the size of A and B, fp32: the parameters, and the plain LoRA of an adapter without gains."""
    return sum(4 * r * (m + n) for m, n in modules)


def calibration_bytes(shape: Shape) -> int:
    """Return what calibration stores: the input eigenvectors of (gate and up, down), and the output ones of each."""
    inputs = sum(4 * n * min(n, KEPT) for n in (shape.hidden, shape.mlp))
    outputs = 4 * K * (2 * shape.mlp + shape.hidden)
    return shape.layers * (inputs + outputs)


def passes(shape: Shape) -> int:
    """Return how often calibration runs over its text: 4 GiB hold the moments of so many modules at a time."""
    return -(-3 * shape.layers // max(1, (4 << 30) // (8 * shape.mlp**2)))


def rows() -> Iterator[tuple[str, ...]]:
    """Yield the table, a column a model."""
    yield "", *SHAPES
    for name, value in {
        "base model in bf16, GB": lambda s: 2 * s.parameters / 1e9,
        "**factorize** (paper): factors, GB": lambda s: factor_bytes(attention_modules(s)) / 1e9,
        "one weight in fp32, GB": lambda s: 4 * s.hidden**2 / 1e9,
        "10 block products of every weight, 10¹² operations": lambda s: (
            sum(10 * 4 * m * n * (K + 4) for m, n in attention_modules(s)) / 1e12
        ),
        "**calibrate**: largest moment, GB": lambda s: 8 * s.mlp**2 / 1e9,
        "passes over the text": passes,
        "all passes, 10¹⁵ operations": lambda s: passes(s) * s.parameters * (2 * TOKENS + 4 * GRADIENT_TOKENS) / 1e15,
        "eigenvectors, 10¹⁵ operations (fp64)": lambda s: s.layers * 9 * (3 * s.mlp**3 + 2 * s.hidden**3) / 1e15,
        "stored in the cache, GB": lambda s: calibration_bytes(s) / 1e9,
        "**attach**: A, B, GB": lambda s: adapter_bytes(mlp_modules(s)) / 1e9,
        "U, σ, V, GB": lambda s: factor_bytes(mlp_modules(s)) / 1e9,
        "**step**: A, B, gradients, Adam, GB": lambda s: 4 * adapter_bytes(mlp_modules(s)) / 1e9,
        "kept for the backward pass, MB per token": lambda s: (
            s.layers * (2 * (s.hidden + s.mlp) + 3 * 2 * R + 2 * s.hidden + s.mlp) / 1e6
        ),
        "low-rank products, % of the step's operations": lambda s: (
            100 * sum(6 * R * (m + n) for m, n in mlp_modules(s)) / (4 * s.parameters)
        ),
        "**adapter file**, GB": lambda s: (adapter_bytes(mlp_modules(s)) + factor_bytes(mlp_modules(s))) / 1e9,
        "**export** as LoRA, GB": lambda s: adapter_bytes(mlp_modules(s)) / 1e9,
        "base in fp32, for its comparison of logits, GB": lambda s: 4 * s.parameters / 1e9,
        "**merge** of four by addition, GB": lambda s: 4 * adapter_bytes(mlp_modules(s)) / 1e9,
    }.items():
        yield (
            name,
            *(f"{value(shape):,.3g}" if value(shape) < 100 else f"{value(shape):,.0f}" for shape in SHAPES.values()),
        )


if __name__ == "__main__":
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows())
