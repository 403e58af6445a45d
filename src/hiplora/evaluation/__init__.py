"""What an adapter learned and what it disturbed: response loss on examples, drift from the base on other text."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hiplora.evaluation.drift import BaseReference, Drift, measure_drift
    from hiplora.evaluation.likelihood import Encoded, encode, heldout_loss, response_log_probs
    from hiplora.evaluation.texts import drift_texts

_HOMES = {
    "drift": ("BaseReference", "Drift", "measure_drift"),
    "likelihood": ("Encoded", "encode", "heldout_loss", "response_log_probs"),
    "texts": ("drift_texts",),
}

__all__ = [
    "BaseReference",
    "Drift",
    "Encoded",
    "drift_texts",
    "encode",
    "heldout_loss",
    "measure_drift",
    "response_log_probs",
]


def __getattr__(name: str) -> Any:
    """Load a public name on first use: choosing texts needs no torch."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"hiplora.evaluation.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
