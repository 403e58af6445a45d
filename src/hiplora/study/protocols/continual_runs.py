"""What continual tuning found: every method's scores on every task after every stage, and the paper's numbers (C.4)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hiplora.metrics import CONTINUAL
from hiplora.recipes.protocols import Continual
from hiplora.study.builder import Study
from hiplora.study.engine.jobs import Job
from hiplora.study.results import Results
from hiplora.study.statistics import Draws, Resampler

METRICS = {
    "average accuracy": ("AvgAcc", "high"),
    "forgetting": ("Forgetting", "low"),
    "backward transfer": ("Backward transfer", "high"),
    "learned accuracy": ("Just after training", "high"),
}
Scores = NDArray[np.float64]  # (…, 1 + replicates): each value itself, then its replicates


@dataclass(frozen=True)
class Learner:
    """A method's scores: `by_seed[s][t][i]`, seed s on task i after stage t, with its replicates."""

    title: str
    by_seed: Scores  # (seeds, stages, tasks, 1 + replicates)
    stages: list[list[Job]]  # the jobs of each stage, one a seed

    @property
    def jobs(self) -> list[Job]:
        """The jobs of all stages."""
        return [job for stage in self.stages for job in stage]

    @property
    def matrix(self) -> Scores:
        """The scores' means over the seeds, (stages, tasks, 1 + replicates)."""
        return self.by_seed.mean(axis=0)

    def metric(self, name: str) -> Draws:
        """Return one of `METRICS`, its mean over the runs, with its replicates."""
        return np.mean([CONTINUAL[name](matrix) for matrix in self.by_seed], axis=0)

    def seeds(self, name: str) -> list[float]:
        """Return one of `METRICS` a seed."""
        return [float(CONTINUAL[name](matrix)[0]) for matrix in self.by_seed]


def order_of(study: Study, settings: Continual) -> list[str]:
    """Return the domains in the order of their stages."""
    return list(settings.order or study.recipe.domains)


def titles_of(study: Study, settings: Continual) -> list[str]:
    """Return the domains' titles in the order of the stages."""
    return [study.recipe.domains[domain].title for domain in order_of(study, settings)]


def tasks_of(study: Study, settings: Continual) -> list[str]:
    """Return the tasks that tell the domains' scores, in the order of the stages."""
    return [study.recipe.domains[domain].task for domain in order_of(study, settings)]


def stages_of(study: Study, settings: Continual, method: str) -> list[list[Job]]:
    """Return the jobs that score a method's stages, a list of stages each seed: each stage trains on from the last."""
    found = []
    for seed in study.seeds(settings):
        adapter: Job | None = None
        stages = []
        for domain in order_of(study, settings):
            adapter = study.adapter(study.row(method), domain, seed, start=adapter)
            stages.append(study.score(adapter))
        found.append(stages)
    return found


def base_scores(
    study: Study, settings: Continual, results: Results, form: str, draws: Resampler
) -> Scores | None:
    """Return the base's scores on the tasks, (tasks, 1 + replicates); None while they are missing."""
    tasks = tasks_of(study, settings)
    items = [results.items(study.score(), task, form) for task in tasks]
    known = [draws.mean(task, one) for task, one in zip(tasks, items, strict=True) if one is not None]
    return np.array(known) if len(known) == len(tasks) else None


def learners_of(
    study: Study, settings: Continual, results: Results, form: str, draws: Resampler
) -> list[Learner]:
    """Return the methods all of whose stages are there."""
    found, tasks = [], tasks_of(study, settings)
    for method in settings.methods:
        stages = stages_of(study, settings, method)
        items = [[[results.items(job, task, form) for task in tasks] for job in seed] for seed in stages]
        if any(one is None for seed in items for stage in seed for one in stage):
            continue
        by_seed = np.array(
            [
                [
                    [draws.mean(task, one or []) for task, one in zip(tasks, stage, strict=True)]
                    for stage in seed
                ]
                for seed in items
            ]
        )
        by_stage = [list(some) for some in zip(*stages, strict=True)]
        found.append(Learner(study.row(method).title, by_seed, by_stage))
    return found
