"""The merge rules: each a pure function over one module's terms and a small record of its options."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hiplora.errors import ConfigError
from hiplora.export.adapter import Channels, Pair
from hiplora.merging import addition
from hiplora.merging.term import Term


@dataclass(frozen=True, eq=False)
class Rule:
    """A merge rule.

    `combine(terms, options)` merges one module: `terms` are what each adapter that adapts it adds, with its weight.
    It returns the merged factors and, where the rule keeps the two channels of HiP-LoRA apart, those too. `options`
    is the dataclass of its settings, whose fields a command or a document can list.
    """

    name: str
    summary: str
    options: type
    combine: Callable[[Sequence[Term], Any], tuple[Pair, Channels | None]]


RULES: dict[str, Rule] = {
    "addition": Rule("addition", addition.SUMMARY, addition.Options, addition.combine),
}


def rule(name: str) -> Rule:
    """Return a rule by name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in RULES:
        raise ConfigError(f"merge rule {name!r} is not known; expected one of {', '.join(sorted(RULES))}")
    return RULES[name]
