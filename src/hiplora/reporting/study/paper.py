"""What the paper reports, for showing beside measured values: numbers with the place each stands at."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from hiplora.errors import ConfigError
from hiplora.reporting.palette import plain


@dataclass(frozen=True)
class Reported:
    """A number of the paper: its value, what the paper gives beside it (None: nothing), and where it stands."""

    value: float
    where: str
    sd: float | None = None
    low: float | None = None
    high: float | None = None


class PaperValue(float):
    """A number of the paper that knows what the paper gives beside it: `sd`, or the bounds `low` and `high`."""

    sd: float | None = None
    low: float | None = None
    high: float | None = None


def paper_value(table: str, row: str, column: str) -> PaperValue | None:
    """Return the paper's value of a table's cell, or None where the paper (or what is left of it) has none.

    Names of rows and columns match whatever their case and punctuation: `HiP-LoRA` and `hiplora` are one.

    Raises:
        ConfigError: there is no table of that name.
    """
    found = reported(table, row, column)
    if found is None:
        return None
    value = PaperValue(found.value)
    value.sd, value.low, value.high = found.sd, found.low, found.high
    return value


def reported(table: str, row: str, column: str) -> Reported | None:
    """Return the paper's value of a cell with its spread and its place, or None; names and errors as `paper_value`."""
    return _table(table)[1].get((plain(row), plain(column)))


def paper_where(table: str) -> str:
    """Return where in the paper the numbers of a table stand; errors as `paper_value`."""
    return _table(table)[0]


def paper_model() -> str:
    """Return the name of the model that all numbers of the paper are of."""
    return str(_document()["model"])


def paper_tables() -> dict[str, tuple[Sequence[str], Sequence[str]]]:
    """Return, for each table of the paper by its name here, the names of its rows and columns."""
    return {name: (list(table["rows"]), table["columns"]) for name, table in _document()["tables"].items()}


def _table(name: str) -> tuple[str, Mapping[tuple[str, str], Reported]]:
    tables = _tables()
    if name not in tables:
        raise ConfigError(f"table {name!r} of the paper: unknown; name one of {', '.join(tables)}")
    return tables[name]


@functools.cache
def _tables() -> dict[str, tuple[str, Mapping[tuple[str, str], Reported]]]:
    return {
        name: (
            table["where"],
            {
                (plain(row), plain(column)): _reported(value, table["where"])
                for row, values in table["rows"].items()
                for column, value in values.items()
            },
        )
        for name, table in _document()["tables"].items()
    }


def _reported(value: Any, where: str) -> Reported:
    if isinstance(value, Mapping):
        return Reported(where=where, **{key: float(number) for key, number in value.items()})
    return Reported(float(value), where)


@functools.cache
def _document() -> dict[str, Any]:
    import yaml

    return yaml.safe_load(resources.files(__package__).joinpath("paper.yaml").read_text("utf-8"))
