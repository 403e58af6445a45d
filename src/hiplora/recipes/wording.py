"""How questions and their answers are worded, in training rows as in the evaluation's tasks."""

import re
from collections.abc import Mapping
from typing import Any

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def direct_question(row: Mapping[str, Any]) -> str:
    """A question that is to be answered at once."""
    return f"Question: {row['question']}\nAnswer:"


STEP_BY_STEP = "Question: {question} Think step by step.\nAnswer:"  # the answer follows without a space


def step_by_step(question: str) -> str:
    """A question that is to be answered with its derivation, worded as PEFT's comparison of methods words it.

    Source: github.com/huggingface/peft, method_comparison/MetaMathQA/default_training_params.json at 4192101.
    """
    return STEP_BY_STEP.format(question=question)


def lettered(row: Mapping[str, Any]) -> str:
    """A multiple-choice question with its choices behind letters; the answer is a letter."""
    lines = [f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, row["choices"], strict=False)]
    return f"Question: {row['question']}\n{''.join(lines)}Answer:"


def letters(row: Mapping[str, Any]) -> list[str]:
    """The letters that `lettered` gives to a row's choices."""
    return list(LETTERS[: len(row["choices"])])


def final_number(row: Mapping[str, Any]) -> str:
    """The result of a GSM8K solution (after `####`), or of a plain answer, without commas between digits."""
    return normal_number(str(row["answer"]).rpartition("####")[2])


_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def normal_number(text: str) -> str:
    """Return the first number in a text in its plain form: no currency, commas, leading or trailing zeros.

    Text without a number is returned stripped.
    """
    found = _NUMBER.search(text.replace("$", "").replace("€", "").replace("£", ""))
    if found is None:
        return text.strip()
    whole, dot, fraction = found.group().replace(",", "").partition(".")
    fraction = fraction.rstrip("0")
    sign = "-" if whole.startswith("-") else ""
    whole = whole.lstrip("-").lstrip("0") or "0"
    plain = f"{whole}.{fraction}" if dot and fraction else whole
    return plain if plain == "0" else sign + plain


def with_hint(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a question as ScienceQA has them with its hint before it; None where it is about a picture."""
    if row.get("image") is not None:
        return None
    hint = row.get("hint")
    told = isinstance(hint, str) and hint.strip() and isinstance(row["question"], str)
    return {**row, "question": f"{str(hint).strip()}\n{row['question']}"} if told else dict(row)
