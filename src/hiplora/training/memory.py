"""Peak memory of a training."""

import resource
import sys

import torch


def peak_bytes() -> int:
    """Return the peak: allocated bytes on CUDA since its last reset, else resident bytes of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_reserved_bytes() -> int | None:
    """Return the peak of what the CUDA allocator holds since its last reset; None without a GPU."""
    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None
