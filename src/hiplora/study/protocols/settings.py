"""What all protocols share: how their settings are read, and the shape of what they do."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from hiplora.data.examples import Block
from hiplora.study.builder import Study
from hiplora.study.records import Done, Findings, Run

Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
AtLeastZero = Annotated[float, Field(ge=0)]
AboveZero = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Rules = Annotated[dict[str, dict[str, Any]], Field(min_length=1)]

# The fields that name methods or domains of the study, which checks that it has them.
NAMING = {
    **dict.fromkeys(("methods", "method", "reference", "plain", "early"), "methods"),
    **dict.fromkeys(("hiplora", "lora", "proj_lora", "pissa", "split_lora", "adalora"), "methods"),
    **dict.fromkeys(("domains", "domain", "early_domains"), "domains"),
}


class Protocol(Block):
    """Settings that every protocol has."""

    whole: ClassVar[tuple[str, ...]] = ("method",)  # the labels of runs that are shown together or not at all

    seeds: list[Seed] | None = Field(default=None, min_length=1, description="Its seeds, if not the study's.")

    def runs(self, study: Study) -> list[Run]:
        """Return the jobs that the protocol asks for, each with the labels of its rows."""
        raise NotImplementedError

    def tables(self, study: Study, done: Done) -> Findings:
        """Return the findings from the results of the `runs` that are done; there is at least one of a method."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _each_once(self) -> "Protocol":
        for name, values in self:
            if isinstance(values, list) and any(values.count(value) > 1 for value in values):
                raise ValueError(f"`{name}` lists a value twice: {values}; name each once")
        return self

    def named(self) -> Iterator[tuple[str, list[str], str]]:
        """Yield the fields that name parts of the study, with the names, and of which block they are."""
        for field, block in NAMING.items():
            value = getattr(self, field, None)
            if value is not None:
                yield field, [value] if isinstance(value, str) else list(value), block


class OfMethods(Protocol):
    """A protocol that compares methods."""

    methods: list[str] = Field(min_length=1, description="Methods to compare, in the order of the table.")
