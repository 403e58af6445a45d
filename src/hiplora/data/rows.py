"""Rows of data files: readers for JSON, JSON lines and parquet, and the formats that a row may have.

Every row comes with its place ("line 3"), so that an error can name it.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from hiplora.data.prompts import LETTERS
from hiplora.errors import DataError, first_line

Row = tuple[str, Any]  # place, value

SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz", ".parquet")
MAX_SHOWN = 10  # problems listed in full; the rest are counted
ROLES = ("system", "user", "assistant", "tool")
# Format -> its fields, in the order in which "auto" tries them; "completion" may be called "response".
FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "multiple_choice": ("question", "choices", "answer"),
    "question_answer": ("question", "answer"),
    "query_response": ("query", "response"),
    "text": ("text",),
}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


def is_hub_name(source: str | Path) -> bool:
    """Return whether a source is a data set on the hub (`owner/name` or `owner/name:config`), not a file."""
    name = str(source)
    return (
        bool(_HUB_NAME.fullmatch(name)) and not name.endswith((*SUFFIXES, ".txt")) and not Path(name).exists()
    )


def hub_rows(name: str) -> Iterator[Row]:
    """Stream the rows of the train split of a data set on the hub (`is_hub_name`).

    Raises:
        DataError: it cannot be read.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    path, _, config = name.partition(":")
    try:
        rows = load_dataset(path, config or None, split="train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield f"row {number}", row
    except (DatasetsError, OSError, ValueError) as error:
        raise DataError(
            f"{name}: no such file, and no readable data set on the hub ({first_line(error)}); correct the name, "
            "or name a text or data file"
        ) from error


def read_rows(path: Path) -> Iterator[Row]:
    """Yield every row of a data file.

    Raises:
        DataError: the file is missing, empty, of an unknown kind or malformed; the message names the line.
    """
    _check_file(path)
    try:
        if path.name.endswith(".parquet"):
            yield from _parquet(path)
            return
        with _open(path) as file:
            is_json = path.name.endswith((".json", ".json.gz"))
            yield from _json(file, path) if is_json else _json_lines(file, path)
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path}: not readable as UTF-8 or gzip ({error}); write it again") from None


def check_rows(rows: Iterable[Row], format: str, name: str | Path) -> tuple[str, list[Any]]:
    """Check every row against a format and return the format ("auto": that of the first row) and the values.

    Raises:
        DataError: there are no rows, or some do not fit; lists them with their places and what is needed.
    """
    values: list[Any] = []
    problems: list[str] = []
    for place, value in rows:
        if format == "auto":
            format = _first_format(value, f"{name}, {place}")
        if problem := _problem(value, format):
            problems.append(f"{name}, {place}: {problem}")
        values.append(value)
    if not values:
        raise DataError(f"{name}: has no rows; it must have at least one")
    if problems:
        shown = problems[:MAX_SHOWN]
        if len(problems) > MAX_SHOWN:
            shown.append(f"{name}: … and {len(problems) - MAX_SHOWN} more")
        shown.append(
            f"rows of format {format} need {', '.join(FORMATS[format])}; fix the rows or set data.format"
        )
        raise DataError("\n".join(shown))
    return format, values


def detect_format(row: Any) -> str | None:
    """Return the format that a row's fields belong to, or None."""
    if not isinstance(row, Mapping):
        return None
    fields = {*row, "completion"} if "response" in row else {*row}
    return next((name for name, needed in FORMATS.items() if fields >= {*needed}), None)


def completion_field(row: Mapping[str, Any]) -> str:
    """Return the field with the completion of a prompt_completion row: `completion` or `response`."""
    return "response" if "response" in row and "completion" not in row else "completion"


def _check_file(path: Path) -> None:
    if not path.exists():
        near = sorted(p.name for p in path.parent.glob("*") if p.name.endswith(SUFFIXES))[:5]
        beside = f" (data files in that folder: {', '.join(near)})" if near else ""
        raise DataError(f"{path}: no such file; check the path{beside}")
    if path.is_dir() or not path.name.endswith(SUFFIXES):
        raise DataError(f"{path}: not a data file; expected one of {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: is empty; it must have at least one row")


def _open(path: Path) -> TextIO:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return open(path, encoding="utf-8-sig")


def _json_lines(file: TextIO, path: Path) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number}: not valid JSON ({error.msg} at column {error.colno}); each line must "
                "be one JSON object"
            ) from None


def _json(file: TextIO, path: Path) -> Iterator[Row]:
    try:
        value = json.load(file)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines named .json, as many data sets are published
            file.seek(0)
            yield from _json_lines(file, path)
            return
        raise DataError(
            f"{path}, line {error.lineno}: not valid JSON ({error.msg} at column {error.colno})"
        ) from None
    rows = [value] if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of rows, found {type(value).__name__}")
    yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        batches = parquet.ParquetFile(path).iter_batches(batch_size=1024)
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable parquet file ({error}); write it again") from None


def _first_format(row: Any, where: str) -> str:
    if (format := detect_format(row)) is not None:
        return format
    found = f"the fields {', '.join(map(str, row))}" if isinstance(row, Mapping) else type(row).__name__
    needs = "; ".join(f"{name} needs {', '.join(fields)}" for name, fields in FORMATS.items())
    raise DataError(f"{where}: unknown format, found {found}; rename the fields: {needs}")


def _problem(row: Any, format: str) -> str | None:
    """Say what a row lacks to be of a format; None if it fits."""
    if not isinstance(row, Mapping):
        return f"expected an object with fields, found {type(row).__name__}"
    if format == "messages":
        return _messages_problem(row.get("messages"))
    if format == "multiple_choice":
        return _text_problem(row, "question") or _choices_problem(row)
    fields = FORMATS[format]
    if format == "prompt_completion":
        fields = ("prompt", completion_field(row))
    if format == "alpaca" and row.get("input") is not None:
        fields = (*fields, "input")
    return next(filter(None, (_text_problem(row, field) for field in fields)), None)


def _text_problem(row: Mapping[str, Any], field: str) -> str | None:
    if field not in row:
        return f"field `{field}` is missing (found {', '.join(map(str, row)) or 'no fields'})"
    if not isinstance(value := row[field], str):
        return f"field `{field}` is {type(value).__name__} ({value!r:.40}), expected text"
    if not value.strip() and field not in ("prompt", "input"):
        return f"field `{field}` is empty"
    return None


def _choices_problem(row: Mapping[str, Any]) -> str | None:
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        return f"field `choices` is not a list of 2 to {len(LETTERS)} texts"
    if not all(isinstance(choice, str) for choice in choices):
        return "field `choices` has something that is not text"
    if type(answer) is not int or not 0 <= answer < len(choices):
        return (
            f"field `answer` is {answer!r}, expected the index of the right choice, 0 to {len(choices) - 1}"
        )
    return None


def _messages_problem(messages: Any) -> str | None:
    if not isinstance(messages, list) or not messages:
        return "field `messages` is not a list of messages"
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            return f"message {number} has no text `content`"
        if message.get("role") not in ROLES:
            return f"message {number} has role {message.get('role')!r}, expected one of {', '.join(ROLES)}"
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        return "no assistant message with text: nothing to learn"
    return None
