"""hiplora: fine-tune without breaking what the model already knows.

Importing this package registers HiP-LoRA with PEFT (at once if PEFT is loaded, otherwise the moment it is),
so `peft.get_peft_model` and `peft.PeftModel.from_pretrained` know the method. The import itself is light:
torch and PEFT load on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

__version__ = "0.1.0"

_LAZY = {
    "HipLoraConfig": "hiplora.tuner",
    "stability_penalty": "hiplora.tuner",
    "retract_": "hiplora.tuner",
    "max_leak": "hiplora.tuner",
    "calibrate": "hiplora.tuner",
}
_ROOMS = (
    "spectral",
    "tuner",
    "adapters",
    "export",
    "merging",
    "evaluation",
    "training",
    "editing",
    "study",
    "reporting",
)

if TYPE_CHECKING:
    from hiplora.tuner import HipLoraConfig, calibrate, max_leak, retract_, stability_penalty

__all__ = ["HipLoraConfig", "__version__", "calibrate", "max_leak", "retract_", "stability_penalty"]


def __getattr__(name: str) -> Any:
    """Load a public name or a room on first use (PEP 562)."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"hiplora.{name}")
    raise AttributeError(f"module 'hiplora' has no attribute {name!r}")


def _register(_peft: Any) -> None:
    importlib.import_module("hiplora.tuner.registration").register()


wrapt.when_imported("peft")(_register)
