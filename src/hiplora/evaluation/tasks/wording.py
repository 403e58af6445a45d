"""How the tasks word their questions where a template is not enough."""

from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from hiplora.recipes.wording import final_number, lettered, letters, normal_number, step_by_step

__all__ = [
    "final_number",
    "gap_answer",
    "gap_end",
    "gap_start",
    "lettered",
    "letters",
    "normal_number",
    "stated_answer",
    "step_question",
]
# What a derivation says before its answer; the first of these that stands in it counts.
MARKS = ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### ")


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


def step_question(row: Mapping[str, Any]) -> str:
    """A question that is to be answered with its derivation."""
    return step_by_step(row["question"])


def stated_answer(text: str) -> float | str | None:
    """Return the answer that a derivation states, as a number if it is one (or a fraction); None if it states none.

    It is what follows the last mark, up to the end of the line, without the marks of a sentence, of money and of per
    cent around it. A number with commas between its digits counts as text, as where this comes from: PEFT's comparison
    of methods (github.com/huggingface/peft, method_comparison/MetaMathQA/utils.py at 0134244).
    """
    text = text.strip().rstrip(".!?")
    mark = next((mark for mark in MARKS if mark in text), None)
    if mark is None:
        return None
    line = text.rpartition(mark)[2].strip().partition("\n")[0].strip(" .!?$%")
    value = _number(line)
    return line if value is None else value


def _number(text: str) -> float | None:
    parts = text.split("/")
    try:
        numbers = [Decimal(part.strip()) for part in parts]
        if len(numbers) > 2 or (len(numbers) == 2 and numbers[1] == 0):
            return None
        return float(numbers[0] / numbers[1] if len(numbers) == 2 else numbers[0])
    except (InvalidOperation, OverflowError, ValueError):
        return None
