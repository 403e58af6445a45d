"""Rows of a data file, each with the place it stands at, so that an error can name it."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from hiplora.errors import DataError, first_line

SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz", ".parquet")

Row = tuple[str, Any]  # ("line 3", what stands there)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


def is_hub_name(source: str | Path) -> bool:
    """Whether a source of text names a data set on the hub (`owner/name`, `owner/name:config`) and no file."""
    name = str(source)
    return (
        bool(_HUB_NAME.fullmatch(name)) and not name.endswith((*SUFFIXES, ".txt")) and not Path(name).exists()
    )


def hub_rows(name: str) -> Iterator[Row]:
    """Yield the rows of the train split of a data set on the hub (`is_hub_name`), fetching no more than is taken.

    Raises:
        DataError: it cannot be read.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    owner_and_name, _, config = name.partition(":")
    try:
        for number, row in enumerate(
            load_dataset(owner_and_name, config or None, split="train", streaming=True), 1
        ):
            yield f"row {number}", row
    except (DatasetsError, OSError, ValueError) as error:
        raise DataError(
            f"{name}: no such file, and no data set on the hub that can be read ({first_line(error)}); correct the "
            "name, or name a text or data file"
        ) from error


def read_rows(path: Path) -> Iterator[Row]:
    """Yield every row of a data file as (place, value); a JSON line that cannot be parsed is an error.

    Raises:
        DataError: the file is missing, empty, of an unknown kind, or not what its name says; it names the line.
    """
    check_file(path)
    try:
        if path.name.endswith(".parquet"):
            yield from _parquet(path)
            return
        with _open(path) as file:
            yield from (
                _json(file, path) if path.name.endswith((".json", ".json.gz")) else _json_lines(file, path)
            )
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(
            f"{path}: cannot be read as {_kind(path)} ({error}); write it again as UTF-8 text"
        ) from None


def check_file(path: Path) -> None:
    """Check that a data file is there, holds something and has a known suffix.

    Raises:
        DataError: it is not so; the message says which of them.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file; check the path{_neighbours(path)}")
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name a file in it ({', '.join(SUFFIXES)})")
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path}: unknown kind of file; expected one of {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: is empty; it must hold at least one row")


def _kind(path: Path) -> str:
    return "gzipped JSON" if path.name.endswith(".gz") else "JSON"


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (there is no folder {path.parent} either)"
    near = sorted(other.name for other in path.parent.iterdir() if other.name.endswith(SUFFIXES))[:5]
    return f" (data files there: {', '.join(near)})" if near else ""


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
                f"{path}, line {number}: not valid JSON ({error.msg} at column {error.colno}); "
                "each line must hold one JSON object"
            ) from None


def _json(file: TextIO, path: Path) -> Iterator[Row]:
    text = file.read()
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines under the name .json, as many data sets are published
            file.seek(0)
            yield from _json_lines(file, path)
            return
        raise DataError(
            f"{path}, line {error.lineno}: not valid JSON ({error.msg} at column {error.colno})"
        ) from None
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise DataError(
            f"{path}: expected a list of rows, found {type(value).__name__}; write one object a row"
        )
    for number, row in enumerate(value, start=1):
        yield f"row {number}", row


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable parquet file ({error}); write it again") from None
