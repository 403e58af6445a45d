"""The protocols of a study, one a file: settings, the jobs that they ask for, and a function from results to tables."""

import logging
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
from hiplora.study.protocols.settings import Settings
from hiplora.study.protocols.single_task import AdaLora, SingleTask
from hiplora.study.records import Findings, with_jobs
from hiplora.study.store import Results

_NAMED = 12  # jobs that a section lists
log = logging.getLogger(__name__)


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
        """Leave out what recipes of 0.1 may have: two protocols, and a field of a third."""
        if not isinstance(value, dict):
            return value
        kept = {name: block for name, block in value.items() if name not in ("aims", "metamath")}
        if isinstance(merging := kept.get("merging"), dict):
            kept["merging"] = {name: field for name, field in merging.items() if name != "passing"}
        if kept != value:
            log.warning("protocols.aims, protocols.metamath and protocols.merging.passing are ignored: they are gone")
        return kept


def all_jobs(study: Study) -> list[Job]:
    """Return the jobs that a study's protocols want; what those need comes with them."""
    return [job for _, settings in study.recipe.protocols if settings for job, _ in settings.runs(study)]


def sections(study: Study, results: Results) -> list[Findings]:
    """Return what each protocol found; the verdicts on the paper's claims, which read the others, come first."""
    found: list[Findings] = []
    for settings in filter(None, dict(study.recipe.protocols).values()):
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
