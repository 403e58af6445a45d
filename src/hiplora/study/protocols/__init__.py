"""The protocols of a study, one a file: settings, the jobs that they ask for, and a function from results to tables."""

import logging
from collections.abc import Iterator
from typing import Any

from pydantic import Field, model_validator

from hiplora.study.builder import Study
from hiplora.study.jobs import Job
from hiplora.study.protocols.ablations import Ablations
from hiplora.study.protocols.allocation import Allocation
from hiplora.study.protocols.claims import Claims
from hiplora.study.protocols.continual import Continual
from hiplora.study.protocols.cost import CostTable
from hiplora.study.protocols.editing import Editing
from hiplora.study.protocols.frontier import FrontierSettings
from hiplora.study.protocols.lambda_curve import LambdaCurve
from hiplora.study.protocols.merge_fail import MergeFail
from hiplora.study.protocols.merging import Merging
from hiplora.study.protocols.rank_one import RankOne
from hiplora.study.protocols.selection import Selection
from hiplora.study.protocols.settings import Protocol, Settings
from hiplora.study.protocols.single_task import AdaLora, SingleTask
from hiplora.study.records import Findings, with_jobs
from hiplora.study.store import Results

_NAMED = 12  # jobs that a section lists
_GONE = {"aims": None, "metamath": None, "merging": "passing"}  # of recipes of 0.1: a protocol, or a field of one


class Protocols(Settings):
    """Which protocols a study runs."""

    single_task: SingleTask | None = Field(default=None, description="Single-task table with Retain.")
    merging: Merging | None = Field(default=None, description="Merging: before, after, difference.")
    merge_fail: MergeFail | None = Field(default=None, description="MergeFail over sizes and thresholds.")
    adalora: AdaLora | None = Field(default=None, description="Comparison with AdaLoRA.")
    lambda_curve: LambdaCurve | None = Field(default=None, description="Trade-off over λ.")
    allocation: Allocation | None = Field(default=None, description="Spectral allocation.")
    ablations: Ablations | None = Field(default=None, description="Ablations and their dynamics.")
    continual: Continual | None = Field(default=None, description="Continual tuning.")
    editing: Editing | None = Field(default=None, description="Knowledge editing.")
    rank_one: RankOne | None = Field(default=None, description="Rank-1 interventions.")
    selection: Selection | None = Field(default=None, description="Coarse-to-fine selection.")
    cost: CostTable | None = Field(default=None, description="Cost table.")
    frontier: FrontierSettings | None = Field(default=None, description="Frontiers of learning against drift.")
    claims: Claims | None = Field(default=None, description="The paper's claims, one by one.")

    @model_validator(mode="before")
    @classmethod
    def _without_what_is_gone(cls, value: Any) -> Any:
        value = {**value} if isinstance(value, dict) else value
        for name, field in _GONE.items() if isinstance(value, dict) else ():
            block = value.get(name)
            if field is None and value.pop(name, None) is not None:
                logging.getLogger(__name__).warning(
                    "protocols.%s is ignored: there is no such protocol any more", name
                )
            elif isinstance(block, dict) and field in block:
                value[name] = {key: one for key, one in block.items() if key != field}
                logging.getLogger(__name__).warning("protocols.%s.%s is ignored: pass@k needs no tasks", name, field)
        return value


def asked(protocols: Protocols) -> Iterator[Protocol]:
    """Yield each protocol that a recipe asks for, in the order of the report."""
    for _, settings in protocols:
        if settings is not None:
            yield settings


def all_jobs(study: Study) -> list[Job]:
    """Return the jobs that a study's protocols want; what those need comes with them."""
    return [job for settings in asked(study.recipe.protocols) for job, _ in settings.runs(study)]


def sections(study: Study, results: Results) -> list[Findings]:
    """Return what each protocol found; the verdicts on the paper's claims, which read the others, come first."""
    found: list[Findings] = []
    for settings in asked(study.recipe.protocols):
        results.missing.clear()
        results.lost.clear()
        if isinstance(settings, Claims):
            one = settings.judge(study, found)
        else:
            runs = settings.runs(study)
            one = settings.tables(study, results, runs)
            one.measured = with_jobs(one.measured, runs, settings.by)
        one.name, one.title, one.missing = settings.name, settings.title, list(results.missing)
        if results.lost:
            named = "; ".join(list(results.lost)[:_NAMED]) + (" …" if len(results.lost) > _NAMED else "")
            one.text += f"\n\n{len(results.lost)} jobs diverged in training, there are no results: {named}."
        found.append(one)
    return sorted(found, key=lambda one: one.name != Claims.name)
