"""The protocols of a study, one a file: settings, the jobs that they ask for, and a function from results to tables."""

from typing import Any

from pydantic import Field

from hiplora.data.examples import Block
from hiplora.study.builder import Study
from hiplora.study.jobs import DIVERGED
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
from hiplora.study.protocols.settings import Protocol
from hiplora.study.protocols.single_task import AdaLora, SingleTask
from hiplora.study.records import BASE, Findings


class Protocols(Block):
    """Which protocols a study runs; the descriptions are the titles of the report's sections."""

    single_task: SingleTask | None = Field(default=None, description="Single tasks, with Retain")
    merging: Merging | None = Field(default=None, description="Merging the adapters of all domains")
    merge_fail: MergeFail | None = Field(default=None, description="Merges that fail, over sizes and thresholds")
    adalora: AdaLora | None = Field(default=None, description="Comparison with AdaLoRA")
    lambda_curve: LambdaCurve | None = Field(default=None, description="Trade-off over λ")
    allocation: Allocation | None = Field(default=None, description="Where the updates lie")
    ablations: Ablations | None = Field(default=None, description="Ablations and their dynamics")
    continual: Continual | None = Field(default=None, description="Continual tuning")
    editing: Editing | None = Field(default=None, description="Knowledge editing")
    rank_one: RankOne | None = Field(default=None, description="Rank-1 interventions")
    selection: Selection | None = Field(default=None, description="Selection of λ, γ, r and k, coarse to fine")
    cost: CostTable | None = Field(default=None, description="Cost")
    frontier: FrontierSettings | None = Field(default=None, description="Learning against drift")
    claims: Claims | None = Field(default=None, description="The paper's claims, one by one")


def sections(study: Study) -> list[Findings]:
    """Return each protocol's findings; the verdicts on the paper's claims, which read the others, come first."""
    found: list[Findings] = []
    for field, settings in study.recipe.protocols:
        if settings is not None:
            section = settings.judge(study, found) if isinstance(settings, Claims) else _section(study, settings)
            section.name, section.title = field.replace("_", "-"), str(Protocols.model_fields[field].description)
            section.tables = {f"{section.name}-{name}".rstrip("-"): value for name, value in section.tables.items()}
            section.figures = {f"{section.name}-{name}".rstrip("-"): value for name, value in section.figures.items()}
            found.append(section)
    return sorted(found, key=lambda section: section.name != "claims")


def _section(study: Study, settings: Protocol) -> Findings:
    """A protocol's findings. Runs that are equal in the labels `whole` are left out if one of them is not done."""

    def group(labels: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(labels.get(name, "") for name in settings.whole)

    runs, record_of = settings.runs(study), study.store.record
    # The trainings of adapters are read too.
    records = {job: record_of(job.needs.get("adapter", job)) and record_of(job) for job, _ in runs}
    usable = {job: record for job, record in records.items() if record and DIVERGED not in record["result"]}
    incomplete = {group(labels) for job, labels in runs if job not in usable}
    done = [(job, usable[job], labels) for job, labels in runs if group(labels) not in incomplete]
    requested, ready = ({labels.get("method") for *_, labels in some} for some in (runs, done))
    findings = Findings()
    if ready - {BASE} and (BASE in ready or BASE not in requested):  # nothing is compared without the base
        findings = settings.tables(study, done)
    findings.missing = [job.name for job, record in records.items() if record is None]
    if diverged := [job.name for job, record in records.items() if record and job not in usable]:
        names = "; ".join(diverged[:12]) + (" …" if len(diverged) > 12 else "")
        findings.text += f"\n\n{len(diverged)} jobs diverged in training, there are no results: {names}."
    return findings
