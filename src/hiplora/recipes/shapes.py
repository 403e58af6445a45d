"""The shapes that training rows come in, and what is wrong with a row that does not fit."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hiplora.errors import DataError
from hiplora.recipes.rows import Row
from hiplora.recipes.wording import LETTERS

MAX_SHOWN = 10  # problems listed in full; the rest are counted
ROLES = ("system", "user", "assistant", "tool")
NEEDS = {
    "messages": "messages: a list of {role, content} with at least one assistant message",
    "alpaca": "instruction and output (input is optional)",
    "prompt_completion": "prompt and completion (or response)",
    "question_answer": "question and answer",
    "query_response": "query and response",
    "multiple_choice": "question, choices (a list of texts) and answer (the index of the right one)",
    "text": "text",
}


def detect_shape(row: Any) -> str | None:
    """Name the shape that a row's fields belong to, or None."""
    if not isinstance(row, Mapping):
        return None
    fields = row.keys()
    if "messages" in fields:
        return "messages"
    if "instruction" in fields and "output" in fields:
        return "alpaca"
    if "prompt" in fields and fields & {"completion", "response"}:
        return "prompt_completion"
    if {"question", "choices", "answer"} <= fields:
        return "multiple_choice"
    if "question" in fields and "answer" in fields:
        return "question_answer"
    if {"query", "response"} <= fields:
        return "query_response"
    return "text" if "text" in fields else None


def check_rows(rows: Iterable[Row], shape: str, source: str | Path) -> tuple[str, list[Any]]:
    """Check every row and return the shape (found, if `shape` is "auto") with the rows' values.

    Raises:
        DataError: there is no row, or some do not fit; it lists them with their places and says what is needed.
    """
    values: list[Any] = []
    problems: list[str] = []
    for place, value in rows:
        if shape == "auto":
            shape = _first_shape(value, f"{source}, {place}")
        problem = row_problem(value, shape)
        if problem:
            problems.append(f"{source}, {place}: {problem}")
        values.append(value)
    if not values:
        raise DataError(f"{source}: holds no rows; it must hold at least one")
    if problems:
        shown = problems[:MAX_SHOWN]
        if len(problems) > MAX_SHOWN:
            shown.append(f"{source}: … and {len(problems) - MAX_SHOWN} more rows like these")
        shown.append(f"a row of the shape {shape} needs {NEEDS[shape]}; mend the rows, or set data.format")
        raise DataError("\n".join(shown))
    return shape, values


def row_problem(row: Any, shape: str) -> str | None:
    """Say what a row lacks to be of a shape, or None if it fits."""
    if not isinstance(row, Mapping):
        return f"expected an object with fields, found {type(row).__name__}"
    if shape == "messages":
        return _messages_problem(row.get("messages"))
    if shape == "alpaca":
        return (
            _text_problem(row, "instruction")
            or _text_problem(row, "output")
            or (_text_problem(row, "input", empty=True) if row.get("input") is not None else None)
        )
    if shape == "prompt_completion":
        return _text_problem(row, "prompt", empty=True) or _text_problem(row, completion_field(row))
    if shape == "question_answer":
        return _text_problem(row, "question") or _text_problem(row, "answer")
    if shape == "query_response":
        return _text_problem(row, "query") or _text_problem(row, "response")
    if shape == "multiple_choice":
        return _text_problem(row, "question") or _choices_problem(row)
    return _text_problem(row, "text")


def completion_field(row: Mapping[str, Any]) -> str:
    """Name the field that holds the completion of a prompt_completion row."""
    return "response" if "response" in row and "completion" not in row else "completion"


def _first_shape(row: Any, where: str) -> str:
    shape = detect_shape(row)
    if shape is None:
        found = f"the fields {', '.join(map(str, row))}" if isinstance(row, Mapping) else type(row).__name__
        needs = "; ".join(f"{name} needs {fields}" for name, fields in NEEDS.items())
        raise DataError(f"{where}: no known shape, found {found}; rename the fields: {needs}")
    return shape


def _text_problem(row: Mapping[str, Any], field: str, empty: bool = False) -> str | None:
    if field not in row:
        return f"field `{field}` is missing (found {', '.join(map(str, row)) or 'no fields'})"
    value = row[field]
    if not isinstance(value, str):
        return f"field `{field}` is {type(value).__name__} ({value!r:.40}), expected text"
    if not empty and not value.strip():
        return f"field `{field}` is empty"
    return None


def _choices_problem(row: Mapping[str, Any]) -> str | None:
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        return f"field `choices` is missing or no list of 2 to {len(LETTERS)} texts"
    if not all(isinstance(choice, str) for choice in choices):
        return "field `choices` holds something else than texts"
    if type(answer) is not int or not 0 <= answer < len(choices):
        return (
            f"field `answer` is {answer!r}, expected the index of the right choice, 0 to {len(choices) - 1}"
        )
    return None


def _messages_problem(messages: Any) -> str | None:
    if not isinstance(messages, list) or not messages:
        return "field `messages` is missing or not a list with something in it"
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            return f"message {number} has no text `content`"
        if message.get("role") not in ROLES:
            return (
                f"message {number} has the role {message.get('role')!r}, expected one of {', '.join(ROLES)}"
            )
    replies = [message["content"] for message in messages if message["role"] == "assistant"]
    return (
        None
        if any(reply.strip() for reply in replies)
        else "no assistant message with text: nothing to learn"
    )
