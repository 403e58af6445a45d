"""The protocols of a study, one a file: settings, the jobs that each asks for, and the tables of their results."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

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
from hiplora.study.protocols.metamath import MetaMath
from hiplora.study.protocols.rank_one import RankOne
from hiplora.study.protocols.selection import Selection
from hiplora.study.protocols.settings import Settings
from hiplora.study.protocols.single_task import AdaLora, SingleTask
from hiplora.study.records import Findings

if TYPE_CHECKING:
    from hiplora.study.builder import Study
    from hiplora.study.store import Results

_NAMED = 12  # jobs that a section lists


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
    metamath: MetaMath | None = Field(default=None, description="PEFT's own comparison of methods.")
    claims: Claims | None = Field(default=None, description="The paper's claims, one by one.")

    @model_validator(mode="before")
    @classmethod
    def _without_aims(cls, value: Any) -> Any:
        if isinstance(value, dict) and "aims" in value:
            logging.getLogger(__name__).info("protocols.aims is ignored: hiplora 0.2 has no such protocol")
            value = {name: settings for name, settings in value.items() if name != "aims"}
        return value


def asked(protocols: Protocols) -> Iterator[tuple[Any, Any]]:
    """Yield the module and settings of each protocol that a recipe asks for, in the order of the report.

    The module that has a protocol's settings has its functions `jobs(study, settings)` and `tables(study, settings,
    results)` too.
    """
    for _, settings in protocols:
        if settings is not None:
            yield sys.modules[type(settings).__module__], settings


def all_jobs(study: Study) -> list[Job]:
    """Return the jobs that a study's protocols want; what those need comes with them."""
    return [job for module, settings in asked(study.recipe.protocols) for job in module.jobs(study, settings)]


def sections(study: Study, results: Results) -> list[Findings]:
    """Return what each protocol found; the verdicts on the paper's claims, which read the others, come first."""
    verdicts: list[Findings] = []
    found: list[Findings] = []
    for module, settings in asked(study.recipe.protocols):
        if isinstance(settings, Claims):
            verdicts.append(module.judge(study, settings, found))
            continue
        results.missing.clear()
        results.lost.clear()
        one = module.tables(study, settings, results)
        one.missing = list(results.missing)
        if results.lost:
            named = "; ".join(list(results.lost)[:_NAMED]) + (" …" if len(results.lost) > _NAMED else "")
            one.text += f"\n\n{len(results.lost)} jobs diverged in training, there are no results: {named}."
        found.append(one)
    return [*verdicts, *found]
