"""Knowledge edits: sets of facts to rewrite, training on them, and whether they took."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hiplora.editing.edits import Edit, EditSet, load_edit_sets
    from hiplora.editing.success import EditOutcome, EditScore, evaluate_edits, score
    from hiplora.editing.train import EditTraining, EditTrainingResult, train_edits

_HOMES = {
    "edits": ("Edit", "EditSet", "load_edit_sets"),
    "success": ("EditOutcome", "EditScore", "evaluate_edits", "score"),
    "train": ("EditTraining", "EditTrainingResult", "train_edits"),
}

__all__ = [
    "Edit",
    "EditOutcome",
    "EditScore",
    "EditSet",
    "EditTraining",
    "EditTrainingResult",
    "evaluate_edits",
    "load_edit_sets",
    "score",
    "train_edits",
]


def __getattr__(name: str) -> Any:
    """Load a public name on first use: reading edits needs no torch."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"hiplora.editing.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
