"""AlphaEdit (Fang et al. 2024): edits written into MLP weights, kept out of the directions that other text uses."""

from hiplora.editing.alphaedit.editor import AlphaEditor
from hiplora.editing.alphaedit.saving import save_update
from hiplora.editing.alphaedit.settings import AlphaEdit
from hiplora.editing.alphaedit.update import null_space, null_space_update

__all__ = ["AlphaEdit", "AlphaEditor", "null_space", "null_space_update", "save_update"]
