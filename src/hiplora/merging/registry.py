"""The merge rules: each a pure function over one module's terms and a small record of its options."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hiplora.errors import ConfigError

if TYPE_CHECKING:
    from hiplora.export.adapter import Channels, Pair
    from hiplora.merging.term import Term


@dataclass(frozen=True)
class Rule:
    """A merge rule, by name; its code is in the module `home`, loaded when it is used."""

    name: str
    summary: str
    home: str

    @property
    def options(self) -> type:
        """Return the dataclass of its settings, whose fields a command or a document can list."""
        return importlib.import_module(self.home).Options

    @property
    def combine(self) -> "Callable[[Sequence[Term], Any], tuple[Pair, Channels | None]]":
        """Return its function, `combine(terms, options)`, which merges one module.

        `terms` are what each adapter that adapts it adds, with its weight. It returns the merged factors and, where
        the rule keeps the two channels of HiP-LoRA apart, those too.
        """
        return importlib.import_module(self.home).combine


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(
            "addition",
            "the weighted sum of the updates, exact: gains added in a shared basis, everything else concatenated",
            "hiplora.merging.addition",
        ),
    )
}


def rule(name: str) -> Rule:
    """Return a rule by name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in RULES:
        raise ConfigError(f"merge rule {name!r} is not known; expected one of {', '.join(sorted(RULES))}")
    return RULES[name]
