"""What goes into a metric is looked at first; an error names the place and the value."""

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hiplora.errors import ConfigError, DataError

Scores = Mapping[str, float]  # name of a benchmark or task -> score in per cent, higher is better

_KINDS = ("a number", "a list of numbers, not empty", "a table of numbers, not empty")


def numbers(values: ArrayLike, what: str, axes: int = 1) -> NDArray[np.float64]:
    """Return `values` as a float64 array of so many axes, none of them empty.

    Raises:
        DataError: they are no such array.
    """
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{what}: not an array of numbers ({error})") from None
    if array.ndim != axes or array.size == 0:
        raise DataError(f"{what}: has shape {array.shape}; expected {_KINDS[axes]}")
    return array


def finite(values: ArrayLike, what: str, axes: int = 1) -> NDArray[np.float64]:
    """Return `numbers`, all of them finite.

    Raises:
        DataError: they are no such array, or one is NaN or infinite.
    """
    array = numbers(values, what, axes)
    require(np.isfinite(array), array, what, "a finite number")
    return array


def require(good: NDArray[np.bool_], array: NDArray, what: str, expected: str) -> None:
    """Raise a DataError that names the first place where `good` is False, with the value there."""
    if not good.all():
        place = tuple(int(index) for index in np.argwhere(~good)[0])
        shown = "".join(f"[{index}]" for index in place)
        raise DataError(f"{what}{shown} is {array[place]}; expected {expected}")


def scores(table: Scores, what: str) -> dict[str, float]:
    """Return a table of scores as floats: at least one, each finite and at least 0.

    Raises:
        DataError: it is none; the error names the score.
    """
    if not isinstance(table, Mapping) or not table:
        raise DataError(
            f"{what}: is {table!r}; expected a mapping from at least one name to a score in per cent"
        )
    return {name: score(value, f"{what}[{name!r}]") for name, value in table.items()}


def score(value: Any, what: str) -> float:
    """Return a score as a float, finite and at least 0.

    Raises:
        DataError: it is not.
    """
    found = float(finite(value, what, axes=0))
    if found < 0:
        raise DataError(f"{what} is {found}; expected a score in per cent, at least 0")
    return found


def same_names(
    found: Mapping[str, Any], expected: Mapping[str, Any], what: str, other: str, kind: str
) -> None:
    """Raise a DataError that names the first name that only one of two tables has."""
    for name in expected:
        if name not in found:
            raise DataError(
                f"{what}: {kind} {name!r} is missing, and {other} has it; score both on the same {kind}s"
            )
    for name in found:
        if name not in expected:
            raise DataError(
                f"{other}: {kind} {name!r} is missing, and {what} has it; score both on the same {kind}s"
            )


def integer(value: Any, name: str, least: int) -> int:
    """Return a whole number that is at least `least`.

    Raises:
        ConfigError: it is not.
    """
    try:
        found = operator.index(value)
    except TypeError:
        found = None
    if found is None or found < least:
        raise ConfigError(f"{name} is {value!r}; expected a whole number of at least {least}")
    return found
