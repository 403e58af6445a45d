"""Rows of data files: readers for JSON, JSON lines and parquet, and the formats that a row may have.

Every row comes with its place ("line 3"), so that an error can name it.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    create_model,
)

from hiplora.data.prompts import LETTERS
from hiplora.errors import DataError, first_line, first_problem

Row = tuple[str, Any]  # place, value

SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz", ".parquet")
MAX_SHOWN = 10  # problems listed in full; the rest are counted
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


def _not_empty(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    return text


def _says_something(messages: list[Any]) -> list[Any]:
    if not any(message.role == "assistant" and message.content.strip() for message in messages):
        raise ValueError("no assistant message with text: nothing to learn")
    return messages


def _is_a_choice(answer: int, info: ValidationInfo) -> int:
    if not 0 <= answer < len(choices := info.data.get("choices", ())):
        raise ValueError(f"{answer} is not the index of a choice, 0 to {len(choices) - 1}")
    return answer


def _model(**fields: Any) -> type[BaseModel]:
    return create_model("Row", __config__=ConfigDict(strict=True), **fields)


Text = (Annotated[str, AfterValidator(_not_empty)], ...)
Message = _model(role=(Literal["system", "user", "assistant", "tool"], ...), content=(str, ...))
Choices = Annotated[list[str], Field(min_length=2, max_length=len(LETTERS))]
Completion = (Text[0], Field(validation_alias=AliasChoices("completion", "response")))
# In the order in which "auto" tries them.
FORMATS: dict[str, type[BaseModel]] = {
    "messages": _model(messages=(Annotated[list[Message], AfterValidator(_says_something)], ...)),  # type: ignore
    "alpaca": _model(instruction=Text, output=Text, input=(str | None, None)),
    "prompt_completion": _model(prompt=(str, ...), completion=Completion),
    "multiple_choice": _model(
        question=Text, choices=(Choices, ...), answer=(Annotated[int, AfterValidator(_is_a_choice)], ...)
    ),
    "question_answer": _model(question=Text, answer=Text),
    "query_response": _model(query=Text, response=Text),
    "text": _model(text=Text),
}
NEEDED = {
    name: [field for field, info in format.model_fields.items() if info.is_required()]
    for name, format in FORMATS.items()
}


def is_hub_name(source: str | Path) -> bool:
    """Return whether a source is a data set on the hub (`owner/name` or `owner/name:config`), not a file."""
    name = str(source)
    is_file = name.endswith((*SUFFIXES, ".txt")) or Path(name).exists()
    return bool(_HUB_NAME.fullmatch(name)) and not is_file


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
    if not path.exists():
        raise DataError(f"{path}: no such file; check the path")
    if path.is_dir() or not path.name.endswith(SUFFIXES):
        raise DataError(f"{path}: not a data file; expected one of {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: is empty; it must have at least one row")
    if path.name.endswith(".parquet"):
        yield from _parquet(path)
        return
    opened = gzip.open if path.name.endswith(".gz") else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
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
        try:
            FORMATS[format].model_validate(value)
        except ValidationError as error:
            missing = error.errors()[0]["type"] == "missing"
            found = f" (found {', '.join(map(str, value)) or 'no fields'})" if missing else ""
            problems.append(f"{name}, {place}: {first_problem(error)}{found}")
        values.append(value)
    if not values:
        raise DataError(f"{name}: has no rows; it must have at least one")
    if problems:
        shown = problems[:MAX_SHOWN]
        if len(problems) > MAX_SHOWN:
            shown.append(f"{name}: … and {len(problems) - MAX_SHOWN} more")
        needed = ", ".join(NEEDED[format])
        raise DataError("\n".join([*shown, f"rows of format {format} need {needed}; fix the rows or set data.format"]))
    return format, values


def detect_format(row: Any) -> str | None:
    """Return the format that a row's fields belong to, or None."""
    if not isinstance(row, Mapping):
        return None
    fields = {*row, "completion"} if "response" in row else {*row}
    return next((name for name, needed in NEEDED.items() if fields >= {*needed}), None)


def _first_format(row: Any, where: str) -> str:
    if (format := detect_format(row)) is not None:
        return format
    found = f"the fields {', '.join(map(str, row))}" if isinstance(row, Mapping) else type(row).__name__
    needs = "; ".join(f"{name} needs {', '.join(fields)}" for name, fields in NEEDED.items())
    raise DataError(f"{where}: unknown format, found {found}; rename the fields: {needs}")


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
        rows = json.load(file)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines named .json, as many data sets are published
            file.seek(0)
            yield from _json_lines(file, path)
            return
        raise DataError(f"{path}, line {error.lineno}: not valid JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of rows, found {type(rows).__name__}")
    yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable parquet file ({error}); write it again") from None
    yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))
