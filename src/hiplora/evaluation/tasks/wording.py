"""How the tasks word their questions where a template is not enough."""

from collections.abc import Mapping
from typing import Any

from hiplora.recipes.wording import final_number, lettered, letters, normal_number

__all__ = ["final_number", "gap_answer", "gap_end", "gap_start", "lettered", "letters", "normal_number"]


def gap_start(row: Mapping[str, Any]) -> list[str]:
    """A WinoGrande sentence up to its gap, once with each choice in the gap."""
    before = row["context"].partition("_")[0]
    return [before + choice for choice in row["choices"]]


def gap_end(row: Mapping[str, Any]) -> str:
    """What follows the gap: the same for both choices, so that their likelihoods can be compared."""
    return row["context"].partition("_")[2].strip()


def gap_answer(row: Mapping[str, Any]) -> int:
    """The index of the right choice; lm-eval reads an index as "the choices are in the context"."""
    return int(row["answer"])
