"""Regular expressions that name modules, tried before PEFT matches them: one may be malformed, or never end."""

import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from hiplora.errors import ConfigError, HipLoraError

MATCH_SECONDS = 10
FIELDS = ("rank_pattern", "alpha_pattern", "principal_rank_pattern", "layers_pattern", "modules_to_save")
WHOLE = ("target_modules", "exclude_modules")  # patterns only where they are no lists
_MATCH = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for field, pattern in patterns:
    try:
        re.compile(pattern)
    except re.error as error:
        sys.exit(f"{field} {pattern!r} is no regular expression ({error}); correct it")
    compiled = re.compile(rf"(.*\\.)?({pattern})$")
    for name in names:
        compiled.match(name)
"""


def check_patterns(
    config: Mapping[str, Any], names: Iterable[str], source: str = "", error: type[HipLoraError] = ConfigError
) -> None:
    """Check that the patterns in an adapter's settings are regular expressions and soon matched with module names.

    Raises `error`, its message after `source`, where they are not.
    """
    given: dict[str, Any] = {field: config.get(field) or () for field in (*FIELDS, *WHOLE)}
    listed = {field: [value] if isinstance(value, str) else value for field, value in given.items()}
    patterns = [(field, one) for field in FIELDS for one in listed[field] if isinstance(one, str)]
    patterns += [(field, given[field]) for field in WHOLE if isinstance(given[field], str)]
    unusual = tuple(pair for pair in patterns if not re.fullmatch(r"[\w.-]*", pair[1]))
    if unusual and (problem := _problem(unusual, tuple(names))):
        raise error(f"{source}{problem}")


@functools.lru_cache(maxsize=16)
def _problem(patterns: tuple[tuple[str, str], ...], names: tuple[str, ...]) -> str:
    """Match patterns as PEFT does, in a process that can be stopped; say what is wrong with them."""
    probes = [*names, *(f"{name}!" for name in names)]  # a name that fits but for its end takes longest
    command, given = [sys.executable, "-I", "-c", _MATCH], json.dumps([patterns, probes])
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=MATCH_SECONDS)
    except subprocess.TimeoutExpired:
        these = ", ".join(f"{field} {pattern!r}" for field, pattern in patterns)
        return f"{these} takes over {MATCH_SECONDS} s to match with the modules; write it without nested repetition"
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""
