"""How questions and answers are worded, in training rows and in evaluation tasks alike."""

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def instruction_prompt(instruction: str, material: str = "") -> str:
    """Return an Alpaca-style prompt; the response follows it directly."""
    middle = f"## Material\n{material.strip()}\n\n" if material.strip() else ""
    return f"Carry out the task below.\n\n## Task\n{instruction.strip()}\n\n{middle}## Answer\n"


def direct_question(row: Mapping[str, Any]) -> str:
    """Return the prompt of a question whose answer follows at once."""
    return f"Question: {row['question']}\nAnswer:"


def step_by_step(question: str) -> str:
    """Return the prompt of a question whose answer is a derivation, as in PEFT's comparison of methods.

    Source: github.com/huggingface/peft, method_comparison/MetaMathQA/default_training_params.json at 4192101.
    """
    return f"Question: {question} Think step by step.\nAnswer:"  # the answer follows without a space


def lettered(row: Mapping[str, Any]) -> str:
    """Return the prompt of a multiple-choice question with lettered choices; the answer is a letter."""
    lines = [f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, row["choices"], strict=False)]
    return f"Question: {row['question']}\n{''.join(lines)}Answer:"


def letters(row: Mapping[str, Any]) -> list[str]:
    """Return the letters of a row's choices."""
    return list(LETTERS[: len(row["choices"])])


def final_number(row: Mapping[str, Any]) -> str:
    """Return the result of a GSM8K solution (after `####`), or the last number of a plain answer, in its plain form."""
    answer = str(row["answer"]).rpartition("####")[2]
    return normal_number((_numbers(answer) or [answer])[-1])


def normal_number(text: str) -> str:
    """Return the first number in a text without currency, commas and padding zeros; the stripped text if none."""
    numbers = _numbers(text)
    if not numbers:
        return text.strip()
    number = Decimal(numbers[0].replace(",", ""))
    plain = f"{number:f}"
    return (plain.rstrip("0").rstrip(".") if "." in plain else plain) if number else "0"


def _numbers(text: str) -> list[str]:
    return [match.group() for match in _NUMBER.finditer(re.sub("[$€£]", "", text))]


def with_hint(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a ScienceQA row with the hint prepended to its question; None if the question is about a picture."""
    if row.get("image") is not None:
        return None
    hint = row.get("hint")
    if isinstance(hint, str) and hint.strip() and isinstance(row["question"], str):
        return {**row, "question": f"{hint.strip()}\n{row['question']}"}
    return dict(row)
