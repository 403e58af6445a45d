"""Knowledge edits: sets of facts to rewrite, ways to put them into a model, and what that did to it."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hiplora.editing.alphaedit import AlphaEdit
    from hiplora.editing.counterfact import RELATION_CATEGORIES, load_counterfact, load_edits
    from hiplora.editing.editors import AdapterEditor, Editor
    from hiplora.editing.edits import Edit, EditSet, Question, load_edit_set, load_edit_sets, load_questions
    from hiplora.editing.locality import LocalityOutcome, Reference, measure_locality
    from hiplora.editing.measure import EditRecord, measure_edits, summarise
    from hiplora.editing.run import EditRun, EditSettings, EditStage, run_edits
    from hiplora.editing.success import EditOutcome, EditScore, evaluate_edits, score
    from hiplora.editing.train import EditTraining, EditTrainingResult, train_edits

_HOMES = {
    "alphaedit": ("AlphaEdit",),
    "counterfact": ("RELATION_CATEGORIES", "load_counterfact", "load_edits"),
    "editors": ("AdapterEditor", "Editor"),
    "edits": ("Edit", "EditSet", "Question", "load_edit_set", "load_edit_sets", "load_questions"),
    "locality": ("LocalityOutcome", "Reference", "measure_locality"),
    "measure": ("EditRecord", "measure_edits", "summarise"),
    "run": ("EditRun", "EditSettings", "EditStage", "run_edits"),
    "success": ("EditOutcome", "EditScore", "evaluate_edits", "score"),
    "train": ("EditTraining", "EditTrainingResult", "train_edits"),
}

__all__ = [
    "RELATION_CATEGORIES",
    "AdapterEditor",
    "AlphaEdit",
    "Edit",
    "EditOutcome",
    "EditRecord",
    "EditRun",
    "EditScore",
    "EditSet",
    "EditSettings",
    "EditStage",
    "EditTraining",
    "EditTrainingResult",
    "Editor",
    "LocalityOutcome",
    "Question",
    "Reference",
    "evaluate_edits",
    "load_counterfact",
    "load_edit_set",
    "load_edit_sets",
    "load_edits",
    "load_questions",
    "measure_edits",
    "measure_locality",
    "run_edits",
    "score",
    "summarise",
    "train_edits",
]


def __getattr__(name: str) -> Any:
    """Load a public name on first use: reading edits needs no torch."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"hiplora.editing.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
