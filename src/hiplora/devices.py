"""Where a model is computed, and in which precision."""

from typing import TYPE_CHECKING

from hiplora.errors import ConfigError, first_line

if TYPE_CHECKING:
    import torch


def machine_dtype() -> str:
    """Return the precision of `train.dtype: auto` on this machine: "bf16" or "fp32"."""
    import torch

    gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if gpu else "fp32"


def torch_dtype(name: str) -> "torch.dtype":
    """Return torch's type for a recipe's `dtype`, which is not "auto"."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def pick_device(device: str = "auto") -> str:
    """Return the device to compute on; "auto" is a GPU where there is one, else the CPU.

    Raises:
        ConfigError: this machine does not have the device.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"--device {device}: not available here ({first_line(error)}); leave it out, or name cpu or cuda"
        ) from None
    return device


def measuring_place(device: str = "auto") -> "tuple[str, torch.dtype]":
    """Return where a model is measured and in which precision: in bf16 on a GPU, in fp32 on the CPU."""
    import torch

    device = pick_device(device)
    return device, torch.float32 if device == "cpu" else torch.bfloat16
