"""The merge rules: each a pure function over one module's updates and a small record of its options."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hiplora.errors import ConfigError


@dataclass(frozen=True)
class Rule:
    """A merge rule, by name; its code is in the module `home`, whose functions load torch when they are called.

    `kind` says what it works on: "factors" merges thin factors and gives a low-rank update; "dense" merges the entries
    of one module's updates and gives a matrix that is in general of full rank. `source` is where it is from.
    """

    name: str
    summary: str
    kind: Literal["factors", "dense"]
    home: str
    source: str

    @property
    def options(self) -> type:
        """The dataclass of its settings, whose fields a command or a document can list."""
        return importlib.import_module(self.home).Options

    @property
    def combine(self) -> Callable[..., Any]:
        """Its function `combine(terms, options)`, which merges one module.

        Of kind "factors": `terms` are a sequence of `Term`, what each adapter that adapts the module adds and its
        weight. It returns the merged factors and, where the rule keeps the two channels of HiP-LoRA apart, those too;
        else None. Of kind "dense": `terms` are an iterable of `DenseTerm`, whose updates (m, n) the rule may overwrite.
        It returns the merged update (m, n).
        """
        return importlib.import_module(self.home).combine

    @property
    def defaults(self) -> dict[str, Any]:
        """Its options by name, with their defaults."""
        return {field.name: field.default for field in dataclasses.fields(self.options)}

    def make_options(self, given: Mapping[str, Any] | None = None) -> Any:
        """Return its options with some of them set.

        Raises:
            ConfigError: it has no option of that name, or the value makes no sense.
        """
        for name in given or {}:
            if name not in self.defaults:
                known = ", ".join(self.defaults) or "none"
                raise ConfigError(f"merge rule {self.name!r} has no option {name!r}; its options: {known}")
        return self.options(**given or {})


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(
            "addition",
            "the weighted sum of the updates, exact: gains added in a shared basis, everything else concatenated",
            "factors",
            "hiplora.merging.addition",
            "Ilharco et al. 2023, Editing models with task arithmetic",
        ),
        Rule(
            "ties",
            "the largest entries of each update; where signs differ, the mean of those that agree with their sum",
            "dense",
            "hiplora.merging.ties",
            "Yadav et al. 2023, TIES-Merging",
        ),
        Rule(
            "dare",
            "the weighted sum of entries drawn at random, scaled up for those that were dropped",
            "dense",
            "hiplora.merging.dare",
            "Yu et al. 2024, Language models are Super Mario",
        ),
        Rule(
            "magnitude",
            "the weighted sum of the largest entries of each update",
            "dense",
            "hiplora.merging.magnitude",
            "PEFT's magnitude_prune",
        ),
        Rule(
            "knots",
            "TIES among the updates' coordinates in output directions that they share",
            "factors",
            "hiplora.merging.knots",
            "Stoica et al. 2024, Model merging with SVD to tie the KnOTS",
        ),
        Rule(
            "tsv",
            "the singular triplets of all updates, their directions made orthogonal to each other",
            "factors",
            "hiplora.merging.tsv",
            "Gargiulo et al. 2025, Task Singular Vectors",
        ),
        Rule(
            "iso-c",
            "the directions of the weighted sum, all made equally strong",
            "factors",
            "hiplora.merging.iso_c",
            "Marczak et al. 2025, No Task Left Behind",
        ),
    )
}


def rule(name: str) -> Rule:
    """Return a rule by name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in RULES:
        raise ConfigError(f"merge rule {name!r} is not known; expected one of {', '.join(RULES)}")
    return RULES[name]
