"""Rows of data files, each with its place ("line 3") so that an error can name it, and the formats they may have."""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

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

from hiplora.data.messages import BEFORE, as_messages, has_history, renamed, with_history
from hiplora.data.prompts import LETTERS, with_hint
from hiplora.errors import DataError, first_line, first_problem

Row = tuple[str, Any]  # place, value

SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz", ".parquet", ".csv", ".tsv", ".txt")
MAX_SHOWN = 10  # problems listed in full; the rest are counted
_PREFERENCES = "docs/tutorials/preferences-and-rewards.md"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


def _not_empty(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    return text


def _has_an_answer(messages: list[Any]) -> list[Any]:
    answers = [message for message in messages if message.role == "assistant" and message.weight]
    if not answers or not ((answers[-1].content or "").strip() or answers[-1].tool_calls):
        raise ValueError("no assistant message, or an empty one at the end: nothing to learn")
    return messages


def _is_index_of_choice(answer: int, info: ValidationInfo) -> int:
    choices = info.data.get("choices", ())
    if not 0 <= answer < len(choices):
        raise ValueError(f"{answer} is not the index of a choice, 0 to {len(choices) - 1}")
    return answer


def _has_content(content: str | None, info: ValidationInfo) -> str | None:
    if content is None and not info.data.get("tool_calls"):
        raise ValueError("is missing; only a message with tool_calls may have none")
    return content


def _model(**fields: Any) -> type[BaseModel]:
    return create_model("Row", __config__=ConfigDict(strict=True, validate_default=True), **fields)


Text = (Annotated[str, AfterValidator(_not_empty)], ...)
Context = (str | None, None)
Message = _model(
    role=(Literal["system", "user", "assistant", "tool"], ...),
    tool_calls=(list[dict[str, Any]] | None, None),
    content=(Annotated[str | None, AfterValidator(_has_content)], None),
    weight=(Literal[0, 1], 1),
)
Choices = Annotated[list[str], Field(min_length=2, max_length=len(LETTERS))]
Completion = (Text[0], Field(validation_alias=AliasChoices("completion", "response")))
# In the order in which "auto" tries them.
FORMATS: dict[str, type[BaseModel]] = {
    "messages": _model(
        messages=(Annotated[list[Message], AfterValidator(_has_an_answer)], ...),  # type: ignore[valid-type]
        tools=(list[dict[str, Any]] | None, None),
        system=(str | None, None),
        learn_from=(int, 0),
    ),
    "alpaca": _model(instruction=Text, output=Text, input=(str | None, None)),
    "prompt_completion": _model(prompt=(str, ...), completion=Completion),
    "multiple_choice": _model(
        question=Text,
        choices=(Choices, ...),
        answer=(Annotated[int, AfterValidator(_is_index_of_choice)], ...),
        context=Context,
    ),
    "question_answer": _model(question=Text, answer=Text, context=Context),
    "query_response": _model(query=Text, response=Text, context=Context),
    "text": _model(text=Text),
}
NEEDED = {
    name: [field for field, info in format.model_fields.items() if info.is_required()]
    for name, format in FORMATS.items()
}


def is_hub_name(source: str | Path) -> bool:
    """Return whether a source is a data set on the hub (`owner/name` or `owner/name:config`), not a file."""
    name = str(source)
    return bool(_HUB_NAME.fullmatch(name)) and not name.endswith(SUFFIXES) and not Path(name).exists()


def hub_rows(name: str, config: str | None = None, split: str = "train", streaming: bool = False) -> Iterator[Row]:
    """Yield the rows of a data set on the hub; multiple choice gets its hint, questions about pictures are left out."""
    from datasets import Image, load_dataset
    from datasets.exceptions import DatasetsError

    try:
        rows: Any = load_dataset(name, config, split=split, streaming=streaming)
        if isinstance((getattr(rows, "features", None) or {}).get("image"), Image):
            rows = rows.cast_column("image", Image(decode=False))
        for number, row in enumerate(rows, start=1):
            readable = with_hint(row) if detect_format(row) == "multiple_choice" else row
            if readable is not None:
                yield f"row {number}", _without_nulls(readable)
    except (DatasetsError, OSError, ValueError) as error:
        what = f"no such file, and no data set on the hub that can be read ({first_line(error)})"
        raise DataError(f"{name}: {what}; correct the name, its configuration or split, or name a file") from error


def read_rows(path: Path, bad: list[str] | None = None) -> Iterator[Row]:
    """Yield every row of a data file; a text file is one row.

    Raises DataError, with the line, for a file that is malformed, missing, empty or of an unknown kind. `bad` takes
    what is wrong with lines that are not JSON, which are then left out.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file; check the path")
    if path.is_dir() or not path.name.endswith(SUFFIXES):
        raise DataError(f"{path}: not a data file; expected one of {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: is empty; it must have at least one row")
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    try:
        with (gzip.open if path.name.endswith(".gz") else open)(path, "rb") as file:
            if kind == "parquet":
                yield from _parquet(path)
            elif kind in ("jsonl", "ndjson"):
                yield from _json_lines(file, path, bad)
            elif kind == "txt":
                yield "line 1", {"text": decoded(file.read(), path)}
            else:
                text = decoded(file.read(), path, lenient=bad is not None)
                yield from _json(text, path, bad) if kind == "json" else _csv(text, path, bad)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path}: not readable as gzip ({error}); write it again") from None


def decoded(raw: bytes, path: str | Path, line: int = 1, lenient: bool = False) -> str:
    """Return UTF-8 text without a byte-order mark; DataError names the line, counted from `line`, that is not UTF-8.

    A `lenient` reading marks such bytes instead, as half characters, which no row may have.
    """
    if encoding := _utf_16_or_32(raw[:64]):
        raise DataError(f"{path}, line {line}: not UTF-8, it looks like {encoding}; {_CONVERT.format(encoding)}")
    try:
        return raw.decode("utf-8-sig", "surrogateescape" if lenient else "strict")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        what = f"{path}, line {line}: not UTF-8 (byte 0x{raw[error.start]:02x})"
        try:
            raw.decode("WINDOWS-1252")
        except UnicodeDecodeError:
            raise DataError(f"{what}, and no text that is known; write it again as UTF-8") from None
        raise DataError(f"{what}, it looks like WINDOWS-1252; {_CONVERT.format('WINDOWS-1252')}") from None


_CONVERT = "convert it with `iconv -f {} -t UTF-8`"


def _utf_16_or_32(head: bytes) -> str:
    """Name UTF-16 or UTF-32 where a file begins with its byte-order mark, or has a zero in many of its first bytes."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    zeros = head.count(0)
    if 8 * zeros < max(len(head), 8):
        return ""
    return f"UTF-{32 if 5 * zeros > 3 * len(head) else 16}{'LE' if head[0] else 'BE'}"


def check_rows(
    rows: Iterable[Row], format: str, name: str | Path, bad: list[str] | None = None
) -> tuple[str, list[Row]]:
    """Check every row against a format; return the format ("auto": that of the first good row), and the rows.

    Conversations of ShareGPT, TRL and LLaMA-Factory become messages, and fields get the project's names. Raises
    DataError if there are no rows, or with a list of those that do not fit; where `bad` takes these, they are left out.
    """
    values: list[Row] = []
    problems: list[str] = [] if bad is None else bad
    earlier = len(problems)  # of other files
    candidates = [(place, value if format == "text" else renamed(value)) for place, value in rows]
    conversations = format == "messages" or (format == "auto" and any(has_history(value) for _, value in candidates))
    for place, value in candidates:
        where = f"{name}, {place}"
        try:
            value = as_messages(with_history(value) if conversations else value)
            row_format = _first_format(value) if format == "auto" else format
            has_messages = isinstance(value, Mapping) and "learn_from" in value
            if row_format == "prompt_completion" and has_messages and not values:
                row_format = "messages"  # its prompts and completions are lists of messages
            if bad is None:
                format = row_format
            _check(value, row_format)
        except (ValueError, RecursionError) as error:
            problems.append(f"{where}: {error}")
            if format == "auto" and bad is None:
                break
        else:
            values.append((where, value))
            format = row_format
    problems = problems[earlier:]
    if problems and (bad is None or not values):
        lines = problems[:MAX_SHOWN]
        if len(problems) > MAX_SHOWN:
            lines.append(f"{name}: … and {len(problems) - MAX_SHOWN} more")
        if format != "auto":
            way = "fix the rows, set data.format, or leave them out with data.skip_bad_rows"
            lines.append(f"rows of format {format} need {', '.join(NEEDED[format])}; {way}")
        raise DataError("\n".join(lines))
    if not values:
        raise DataError(f"{name}: has no rows; it must have at least one")
    return format, values


def _check(value: Any, format: str) -> None:
    """Raise ValueError if a row does not fit a format."""
    try:
        FORMATS[format].model_validate(value)
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except ValidationError as error:
        missing = error.errors()[0]["type"] == "missing"
        fields = f" (found {', '.join(map(str, value)) or 'no fields'})" if missing else ""
        raise ValueError(first_problem(error) + fields) from None
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        if "\udc80" <= half <= "\udcff":
            raise ValueError(f"not UTF-8 (byte 0x{ord(half) - 0xDC00:02x})") from None
        raise ValueError(f"has half a character ({half!r}), as a text cut within an emoji has; remove it") from None
    if format == "text":
        return
    if unwanted := [name for name in ("label", "kto_tag") if str(value.get(name)).lower() == "false"]:
        what = f"{unwanted[0]} is false: the answer is not wanted, and this is supervised fine-tuning"
        raise ValueError(f"{what}; remove the row, or use TRL's KTOTrainer ({_PREFERENCES})")
    if format != "messages" and (lost := [name for name in BEFORE if value.get(name)]):
        raise ValueError(f"{lost[0]} would be lost, which rows of format {format} lack; give the row as `messages`")


def _without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of a table without the fields of its structs that only other rows have."""

    def without_nulls(value: Any) -> Any:
        if isinstance(value, list):
            return [without_nulls(item) for item in value]
        if isinstance(value, dict):
            return {key: without_nulls(item) for key, item in value.items() if item is not None}
        return value

    return {key: without_nulls(value) for key, value in row.items()}


def detect_format(row: Any) -> str | None:
    """Return the format that a row's fields belong to, or None."""
    if not isinstance(row, Mapping):
        return None
    fields = {*row, "completion"} if "response" in row else {*row}
    return next((name for name, needed in NEEDED.items() if fields >= {*needed}), None)


def _first_format(row: Any) -> str:
    """Return the format that a row's fields belong to; ValueError if there is none."""
    if (format := detect_format(row)) is not None:
        return format
    found = f"the fields {', '.join(map(str, row))}" if isinstance(row, Mapping) else type(row).__name__
    if isinstance(row, Mapping) and {"chosen", "rejected"} <= {*row}:
        what = "is a preference pair, and this is supervised fine-tuning"
        way = f"TRL's DPOTrainer ({_PREFERENCES})"
        raise ValueError(f"{what}; give `prompt` and `completion`, or use {way}")
    needs = "\n".join(f"  {name} needs {', '.join(fields)}" for name, fields in NEEDED.items())
    raise ValueError(f"unknown format, found {found}; rename the fields:\n{needs}")


def _parsed(text: str, path: Path, line: int, hint: str = "") -> Any:
    """Parse JSON that begins in a line of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        reason = f"{error.msg.removesuffix(' at')} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; 3,000 brackets
        reason = first_line(error)
    raise DataError(f"{path}, line {line}: not valid JSON ({reason}){hint}")


def _json_lines(lines: Iterable[bytes], path: Path, bad: list[str] | None = None) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        try:
            if text := decoded(line, path, number).strip():
                yield f"line {number}", _parsed(text, path, number, "; each line must be one JSON object")
        except DataError as error:
            if bad is None:
                raise
            bad.append(str(error))


def _json(text: str, path: Path, bad: list[str] | None = None) -> Iterator[Row]:
    try:
        rows = _parsed(text, path, 1)
    except DataError as error:
        if "Extra data" not in str(error):
            raise
        lines = text.encode(errors="surrogateescape").splitlines()
        yield from _json_lines(lines, path, bad)  # JSON lines named .json, as many data sets are
        return
    rows = [rows] if isinstance(rows, dict) else rows
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of rows, found {type(rows).__name__}")
    yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _csv(text: str, path: Path, bad: list[str] | None = None) -> Iterator[Row]:
    header = re.sub('"[^"]*"', "", text.lstrip().partition("\n")[0])
    # Excel's delimiter is a semicolon where the comma is the decimal; a single column has none to count.
    delimiter = max("\t,;" if path.suffix == ".tsv" else ",;\t", key=header.count)
    csv.field_size_limit(2**31 - 1)  # a text may be long
    # strict: else a quote that is not closed takes in the rows after it, and one inside a text is lost
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if not any(row.pop(None, ())):
                yield f"line {reader.line_num}", row
                continue
            what = f"{path}, line {reader.line_num}: has more fields than the header"
            if bad is None:
                raise DataError(f"{what}; put texts that have a {delimiter!r} in quotes")
            bad.append(what)
    except csv.Error as error:
        way = "put texts with quotes in quotes, and double those inside"
        raise DataError(f"{path}, line {reader.line_num + 1}: not valid CSV ({error}); {way}") from None


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable parquet file ({error}); write it again") from None
    yield from ((f"row {number}", _without_nulls(row)) for number, row in enumerate(rows, start=1))
