"""True fp32 and float64 arithmetic, whatever the surrounding program has switched on for speed."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute without gradients, autocast, TF32 or bf16 shortcuts inside the block.

    A trainer with `tf32=True`, or a model built under autocast, would otherwise round every product to ten
    bits, and no decomposition could meet its tolerance.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def widest(device: torch.device) -> torch.dtype:
    """float64, except on the one kind of device that has none (Apple's)."""
    return torch.float32 if device.type == "mps" else torch.float64
