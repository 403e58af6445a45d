"""hiplora: fine-tune without breaking what the model already knows.

Importing this package registers HiP-LoRA with PEFT, so `peft.get_peft_model` and `peft.PeftModel.from_pretrained` know
the method. The import itself is light: torch and PEFT load on first use. Registration therefore waits for PEFT, through
wrapt's import hook, which runs at once if PEFT is loaded already; PEFT has no entry point for tuners, and an eager
registration would make every `hiplora --help` import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

__version__ = "0.2.0"

_ROOMS = (
    *("adapters", "data", "editing", "evaluation", "export", "merging", "metrics", "models", "probing"),
    *("reporting", "spectral", "study", "training", "tuner"),
)

if TYPE_CHECKING:
    from hiplora.tuner import HipLoraConfig, calibrate, max_leak, retract_, stability_penalty, verify_base

__all__ = ["HipLoraConfig", "__version__", "calibrate", "max_leak", "retract_", "stability_penalty", "verify_base"]


def __getattr__(name: str) -> Any:
    """Load a public name or a room on first use (PEP 562)."""
    if name in __all__:
        return getattr(importlib.import_module("hiplora.tuner"), name)
    if name in _ROOMS:
        return importlib.import_module(f"hiplora.{name}")
    raise AttributeError(f"module 'hiplora' has no attribute {name!r}")


wrapt.when_imported("peft")(lambda _: importlib.import_module("hiplora.tuner"))
