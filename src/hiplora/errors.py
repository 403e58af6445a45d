"""Every failure that a user can cause is one of these; the command line shows them without a traceback."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class HipLoraError(Exception):
    """Base of all errors that hiplora raises on purpose. `exit_code` is the command line's exit status."""

    exit_code = 1


class ConfigError(HipLoraError, ValueError):
    """A configuration, recipe or argument is wrong: it names the field, the value and the remedy."""

    exit_code = 2


class DataError(HipLoraError, ValueError):
    """A data file or row cannot be used: it names the file, the line and the remedy."""

    exit_code = 2


class FactorError(HipLoraError, ValueError):
    """A weight cannot be factored as asked (damaged, NaN); it names the module."""


class FactorSettingError(FactorError, ConfigError):
    """A rank, tolerance or threshold that a weight or its calibration does not admit; it names the module."""


class StoreError(HipLoraError, OSError):
    """The factor store cannot be read or written."""


class AdapterError(HipLoraError, ValueError):
    """An adapter does not fit its base model, is damaged, or leaves the complement it promises."""


class DivergedError(HipLoraError):
    """A training ended in numbers that are not finite; it names the step or the weight, and the remedy."""


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error that says something, or the error's type: what a message quotes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if not line.endswith(":")), [*lines, type(error).__name__][0])


def first_problem(error: "ValidationError") -> str:
    """Return the first thing that pydantic found, with its place where it has one: `steps: should be above 0`."""
    first = error.errors()[0]
    null = first["input"] is None and first["type"] != "value_error"  # whose message is ours
    message = "is null" if null else first["msg"].removeprefix("Value error, ")
    return ": ".join(filter(None, (".".join(map(str, first["loc"])), message)))
