"""What the options of merge rules may be. No torch here: the command lists them in its help."""

import math
from typing import Any

from hiplora.errors import ConfigError


def check_share(name: str, value: Any) -> None:
    """Refuse what is no share above 0 and up to 1.

    Raises:
        ConfigError: naming the option and its value.
    """
    if not is_number(value) or not 0 < value <= 1:
        raise ConfigError(f"{name} is {value!r}; expected a number above 0 and up to 1")


def check_number(name: str, value: Any) -> None:
    """Refuse what is no finite number.

    Raises:
        ConfigError: naming the option and its value.
    """
    if not is_number(value):
        raise ConfigError(f"{name} is {value!r}; expected a finite number")


def check_count(name: str, value: Any, least: int) -> None:
    """Refuse what is no whole number of at least `least`.

    Raises:
        ConfigError: naming the option and its value.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} is {value!r}; expected a whole number of {least} or more")


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither true nor false.

    Raises:
        ConfigError: naming the option and its value.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; expected true or false")


def is_number(value: Any) -> bool:
    """Tell whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def parse_option(text: str) -> tuple[str, Any]:
    """Read `name=value`: a whole number, another number, true, false or none; or else text, which the rule refuses.

    Raises:
        ConfigError: there is no name or no equals sign.
    """
    name, equals, raw = (part.strip() for part in text.partition("="))
    if not name or not equals:
        raise ConfigError(f"--set {text}: expected name=value, for example --set density=0.2")
    if raw in (words := {"true": True, "false": False, "none": None}):
        return name, words[raw]
    for kind in (int, float):
        try:
            return name, kind(raw)
        except ValueError:
            continue
    return name, raw
