"""The protocols of a study, one a file: the jobs that each asks for, and the section that it makes of their results."""

import importlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

from hiplora.recipes.protocols import Protocols
from hiplora.reporting.study.spec import Section
from hiplora.study.builder import Study
from hiplora.study.engine.jobs import Graph, Job
from hiplora.study.results import Results


class ProtocolModule(Protocol):
    """What each file of this package has.

    One that judges what the others found, and stands after them in `Protocols`, has `section_after(study, settings,
    results, sections)` instead of `section`. One that writes files of its own into the report's folder also has
    `files(study, settings, results, sections)`, which returns name → text.
    """

    def jobs(self, study: Study, settings: Any) -> list[Job]:
        """Return the jobs whose results the section reads; what they need comes with them."""

    def section(self, study: Study, settings: Any, results: Results) -> Section:
        """Return what the results say, as far as they are there."""


_NAMED = 12  # jobs that a section lists


def protocol(name: str) -> ProtocolModule:
    """Return the protocol of a field of `Protocols`."""
    module: Any = importlib.import_module(f"hiplora.study.protocols.{name}")
    return module


def asked(protocols: Protocols) -> dict[str, Any]:
    """Return the protocols that a recipe asks for, with their settings, in the order of the report."""
    return {name: settings for name, settings in protocols if settings is not None}


def graph(study: Study) -> Graph:
    """Return all jobs of a study."""
    wanted: list[Job] = []
    for name, settings in asked(study.recipe.protocols).items():
        wanted += protocol(name).jobs(study, settings)
    return Graph(wanted)


def files(study: Study, results: Results, sections: Sequence[Section]) -> dict[str, str]:
    """Return what protocols put into the report's folder beside its own files: name → text."""
    found: dict[str, str] = {}
    for name, settings in asked(study.recipe.protocols).items():
        write = getattr(protocol(name), "files", None)
        if write is not None:
            found |= write(study, settings, results, sections)
    return found


def sections(study: Study, results: Results) -> list[Section]:
    """Return the sections of all protocols that are asked for; those that judge the others see them, and come first."""
    verdicts: list[Section] = []
    found: list[Section] = []
    for name, settings in asked(study.recipe.protocols).items():
        results.missing.clear()
        results.lost.clear()
        module = protocol(name)
        judge = getattr(module, "section_after", None)
        if judge is None:
            section = module.section(study, settings, results)
            found.append(replace(section, text=[*section.text, *_lost(results)]))
        else:
            verdicts.append(judge(study, settings, results, tuple(found)))
    return [*verdicts, *found]


def _lost(results: Results) -> Iterator[str]:
    """Name the jobs that a section has no results of, since a training diverged."""
    if results.lost:
        named = list(itertools.islice(results.lost, _NAMED))
        more = f" and {len(results.lost) - _NAMED:,} more" if len(results.lost) > _NAMED else ""
        yield f"Diverged in training, so that there is nothing to show of them: {'; '.join(named)}{more}."
