"""Peak memory of a stretch of work."""

import contextlib
import resource
import sys
from pathlib import Path

import torch

CLEAR = Path("/proc/self/clear_refs")  # writing "5" resets Linux's high-water mark


def reset_peak() -> None:
    """Start measuring anew: CUDA's peak, and on Linux the process's high-water mark."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")


def peak_bytes() -> int:
    """Return the peak since `reset_peak`: allocated bytes on CUDA, else resident bytes of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_reserved_bytes() -> int | None:
    """Return the peak since `reset_peak` of what the CUDA allocator holds; None without a GPU."""
    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None


def reserved_bytes() -> int | None:
    """Return what the CUDA allocator holds now; None without a GPU."""
    return torch.cuda.memory_reserved() if torch.cuda.is_available() else None
