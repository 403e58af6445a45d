"""Reading of a record that somebody else wrote: what is absent or of another shape reads as empty."""

from collections.abc import Mapping, Sequence
from typing import Any

from hiplora.errors import DataError
from hiplora.reporting.numbers import number, printable

SCHEMA = 1


def check(raw: Any, kinds: Sequence[str], what: str = "results") -> str:
    """Return the record's kind, one of `kinds`; `what` is what messages call the record.

    Raises:
        DataError: not a dictionary, another kind, or a schema that this version cannot read.
    """
    if not isinstance(raw, Mapping):
        raise DataError(
            f"{what}: expected a dictionary, got {type(raw).__name__}; pass the content of the JSON file"
        )
    schema = raw.get("schema")
    if schema != SCHEMA:
        raise DataError(
            f"{what}: schema {schema!r} is not known, this version reads schema {SCHEMA}; "
            "measure again, or use the version of hiplora that wrote the file"
        )
    kind = raw.get("kind")
    if kind not in kinds:
        raise DataError(f"{what}: kind {kind!r}, expected {' or '.join(map(repr, kinds))}")
    return str(kind)


def as_numbers(raw: Any) -> dict[str, float | None]:
    """Return the numbers of a mapping, by name."""
    return {as_text(key): number(value) for key, value in as_mapping(raw).items()}


def as_mapping(raw: Any) -> Mapping[str, Any]:
    """Return a mapping as it is, anything else as an empty one."""
    return raw if isinstance(raw, Mapping) else {}


def as_rows(raw: Any) -> Sequence[Any]:
    """Return a list as it is, anything else (text too) as an empty one."""
    return raw if isinstance(raw, Sequence) and not isinstance(raw, str | bytes) else ()


def as_text(raw: Any) -> str:
    """Return a value as one line of printable text, None as none."""
    return "" if raw is None else printable(raw)
