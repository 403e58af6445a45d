"""Try regular expressions that name modules before PEFT matches them: one may be malformed, or never end."""

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
NAMES_OR_PATTERN = ("target_modules", "exclude_modules")  # a pattern only where it is not a list
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
    """Check that the patterns in an adapter's settings are regular expressions that match module names in time.

    Raises `error`, its message prefixed with `source`, where they are not.
    """
    values: dict[str, Any] = {field: config.get(field) or () for field in (*FIELDS, *NAMES_OR_PATTERN)}
    patterns = []
    for field, value in values.items():
        if isinstance(value, str):
            patterns.append((field, value))
        elif field in FIELDS:
            patterns += [(field, item) for item in value if isinstance(item, str)]
    unusual = tuple(pair for pair in patterns if not re.fullmatch(r"[\w.-]*", pair[1]))
    if unusual and (problem := _problem(unusual, tuple(names))):
        raise error(f"{source}{problem}")


@functools.lru_cache(maxsize=16)
def _problem(patterns: tuple[tuple[str, str], ...], names: tuple[str, ...]) -> str:
    """Match patterns as PEFT does, in a process that can be stopped; return what is wrong with them, if anything."""
    probes = [*names, *(f"{name}!" for name in names)]  # a name that fits but for its end takes longest
    command, request = [sys.executable, "-I", "-c", _MATCH], json.dumps([patterns, probes])
    try:
        result = subprocess.run(command, input=request, capture_output=True, text=True, timeout=MATCH_SECONDS)
    except subprocess.TimeoutExpired:
        listed = ", ".join(f"{field} {pattern!r}" for field, pattern in patterns)
        return f"{listed} takes over {MATCH_SECONDS} s to match with the modules; write it without nested repetition"
    return result.stderr.strip().splitlines()[-1] if result.returncode else ""
