"""How long things are that jobs read: means over published files, in tokens of SmolLM2, measured once.

Of each task 300 items (all, where there are fewer) were asked as `hiplora eval` asks them; of training rows the first
2,000 were encoded as training does, cut at 2,048; of edits and questions all. Other tokenizers differ by a fifth or so.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class TaskLengths:
    """A task: its `rows` on the hub (or in its file, where it is not there), and what an item takes: tokens `read` to
    score its answers, `scored` positions among them.

    `prompt` is what a response is written after, 0 where none is written.
    """

    rows: int
    read: float
    scored: float
    prompt: float = 0.0


@dataclass(frozen=True)
class RowLengths:
    """Training rows of a file: how many there are, their mean length, the share of it that is learned."""

    rows: int
    tokens: float
    learned: float


@dataclass(frozen=True)
class EditLengths:
    """Edits of a file: how many there are, tokens of a prompt with its answer, of the answer alone, of what is written
    after it to see whether it is exact; questions near an edit."""

    rows: int
    tokens: float
    answer: float
    written: int
    near: float = 0.0


TASKS: Mapping[str, TaskLengths] = {
    "arc_challenge": TaskLengths(1172, 51.5, 21.1),
    "arc_easy": TaskLengths(2376, 42.4, 14.6),
    "boolq": TaskLengths(3270, 140.1, 1.0),
    "commonsenseqa": TaskLengths(1221, 27.0, 4.5),
    "gsm8k": TaskLengths(1319, 69.1, 3.3, 66.8),
    "gsm8k_reference": TaskLengths(1319, 203.9, 130.4),
    "gsm8k_solution": TaskLengths(1319, 203.9, 130.4, 73.5),
    "hellaswag": TaskLengths(10_042, 165.1, 115.9),
    "humaneval": TaskLengths(164, 200.6, 59.7, 142.9),
    "humaneval_10": TaskLengths(164, 200.6, 59.7, 142.9),
    "humaneval_solution": TaskLengths(164, 200.6, 59.7),
    "lambada": TaskLengths(5153, 80.4, 1.4),
    "mbpp": TaskLengths(500, 126.2, 69.6, 58.7),
    "mmlu": TaskLengths(14_042, 106.4, 1.0),
    "openbookqa": TaskLengths(500, 42.3, 1.0),
    "piqa": TaskLengths(1838, 63.3, 44.8),
    "scienceqa": TaskLengths(2224, 60.0, 1.0),
    "social_iqa": TaskLengths(1954, 41.6, 10.2),
    "svamp": TaskLengths(1000, 49.0, 3.0, 47.0),
    "wikitext": TaskLengths(60, 4449.6, 4449.6),
    "winogrande": TaskLengths(1267, 42.0, 11.0),
}
OTHER_TASK = TaskLengths(1000, 100.0, 10.0)  # assumed of a task of lm-eval's own

# By the beginning of the file's name, or of the last part of a hub name; `direct` is the template of that name.
ROWS: Mapping[str, RowLengths] = {
    "alpaca": RowLengths(5170, 262.8, 0.87),
    "codealpaca": RowLengths(6550, 107.4, 0.585),
    "scienceqa": RowLengths(6507, 61.4, 0.033),
    "gsm8k": RowLengths(7473, 202.0, 0.62),
    "gsm8k direct": RowLengths(7473, 69.3, 0.062),
    # of Llama 3's tokens, with their prompts learned: as PEFT's comparison of methods counts 20,000 of them
    "metamathqa": RowLengths(395_000, 209.9, 1.0),
    "wikitext": RowLengths(52, 1652.9, 1.0),
}
OTHER_ROWS = RowLengths(5000, 200.0, 0.5)  # assumed of any other file

EDITS: Mapping[str, EditLengths] = {
    "builtin": EditLengths(1590, 12.1, 2.6, 13),
    "counterfact": EditLengths(3940, 11.2, 1.14, 6, 2.83),
    "zsre": EditLengths(783, 14.5, 3.24, 14, 1.0),
}
OTHER_EDITS = EditLengths(1000, 12.0, 2.6, 13)  # assumed of any other file
QUESTION = EditLengths(681, 10.4, 2.0, 10)


def rows_of(name: str, template: str | None) -> RowLengths:
    """Return what is known of the training rows of a file or a data set of the hub."""
    key = key_of(name, ROWS)
    return ROWS.get(f"{key} {template}", ROWS.get(key, OTHER_ROWS))


def edits_of(name: str) -> EditLengths:
    """Return what is known of the edits of a file."""
    return EDITS.get(key_of(name, EDITS), OTHER_EDITS)


def key_of(name: str, known: Mapping[str, object]) -> str:
    """Return the key that a file or a data set of the hub has in a table, by how its name begins; "" for none."""
    last = name.rpartition("/")[2].lower()
    return next((key for key in known if last.startswith(key)), "")
