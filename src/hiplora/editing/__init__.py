"""Knowledge edits: sets of facts to rewrite, ways to put them into a model, and what that did to it."""

from hiplora.extras import require

require("train")

from hiplora.editing.alphaedit import AlphaEdit, AlphaEditor
from hiplora.editing.crispedit import CrispEdit, CrispEditor
from hiplora.editing.editors import AdapterEditor, Editor, EditTraining, train_edits
from hiplora.editing.edits import CATEGORIES, Edit, Question, load_edits, load_questions
from hiplora.editing.job import edit_groups, run_edits
from hiplora.editing.measure import evaluate_edits
