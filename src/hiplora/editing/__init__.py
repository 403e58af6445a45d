"""Knowledge edits: sets of facts to rewrite, ways to put them into a model, and what that did to it."""

from hiplora.editing.alphaedit import AlphaEdit, AlphaEditor, save_update
from hiplora.editing.editors import AdapterEditor, Editor, EditTraining, EditTrainingResult, train_edits
from hiplora.editing.edits import (
    CATEGORIES,
    RELATION_CATEGORIES,
    Edit,
    EditSet,
    Question,
    load_edit_sets,
    load_edits,
    load_questions,
)
from hiplora.editing.measure import (
    Reference,
    evaluate_edits,
    measure_edits,
    measure_locality,
    summarise,
    summarise_locality,
)
from hiplora.editing.run import EditRun, EditSettings, EditStage, edit_groups, run_edits

__all__ = [
    "CATEGORIES",
    "RELATION_CATEGORIES",
    "AdapterEditor",
    "AlphaEdit",
    "AlphaEditor",
    "Edit",
    "EditRun",
    "EditSet",
    "EditSettings",
    "EditStage",
    "EditTraining",
    "EditTrainingResult",
    "Editor",
    "Question",
    "Reference",
    "edit_groups",
    "evaluate_edits",
    "load_edit_sets",
    "load_edits",
    "load_questions",
    "measure_edits",
    "measure_locality",
    "run_edits",
    "save_update",
    "summarise",
    "summarise_locality",
    "train_edits",
]
