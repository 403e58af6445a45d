"""What the comparison on MetaMathQA trains and scores, and its results a method."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from hiplora.recipes.protocols import MetaMath
from hiplora.study.builder import Study
from hiplora.study.engine.jobs import Job
from hiplora.study.results import FORMS, Results
from hiplora.study.statistics import Draws, Estimate, Resampler, estimate, over_seeds


@dataclass(frozen=True)
class Run:
    """A method trained with a seed: the jobs that train and score it."""

    method: str
    seed: int
    train: Job
    score: Job


@dataclass(frozen=True)
class Row:
    """What a method scored and cost; a list has an entry a seed. The base has neither forgetting nor a training."""

    title: str
    task: str
    items: dict[str, list[list[float]]]  # form → seed → item, in per cent
    draws: dict[str, Draws]
    jobs: list[Job]
    forgetting: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    parameters: int | None = None
    seconds: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)

    def estimate(self, form: str) -> Estimate:
        """The score in per cent, with its interval and its spread."""
        by_seed = [float(np.mean(items)) for items in self.items[form]]
        return estimate(self.draws[form], by_seed if self.forgetting else ())

    @property
    def point(self) -> tuple[float, float]:
        """Accuracy as a share, and forgetting in nats."""
        return float(self.draws["accuracy"][0]) / 100, float(np.mean(self.forgetting))


def base_job(study: Study, settings: MetaMath) -> Job:
    """Return the job that scores the bare base."""
    return study.score(tasks=study.tasks_of([settings.domain]))


def all_runs(study: Study, settings: MetaMath) -> Iterator[Run]:
    """Yield every method's runs, a seed each."""
    asked = study.tasks_of([settings.domain])
    for method in settings.methods:
        for seed in study.seeds(settings):
            train = study.adapter(study.row(method), settings.domain, seed)
            yield Run(method, seed, train, study.score(train, asked))


def all_rows(study: Study, settings: MetaMath, results: Results) -> list[Row]:
    """Return the base's row, then those of the methods all of whose runs are there."""
    draws = Resampler()
    (task,) = study.tasks_of([settings.domain])
    rows = [_row("Base model", task, [base_job(study, settings)], (), settings.text, results, draws)]
    for method in settings.methods:
        runs = [run for run in all_runs(study, settings) if run.method == method]
        scores = [run.score for run in runs]
        rows.append(_row(study.row(method).title, task, scores, runs, settings.text, results, draws))
    return [row for row in rows if row is not None]


def _row(
    title: str,
    task: str,
    scores: Sequence[Job],
    runs: Sequence[Run],
    text: str,
    results: Results,
    draws: Resampler,
) -> Row | None:
    items: dict[str, list[list[float]]] = {}
    for form in FORMS:
        items[form] = [one for job in scores if (one := results.items(job, task, form)) is not None]
    scored = [found for job in scores if (found := results.get(job)) is not None]
    trained = [found for run in runs if (found := results.get(run.train)) is not None]
    if any(len(one) < len(scores) for one in items.values()) or len(trained) < len(runs):
        return None
    means = {form: draws.mean(task, over_seeds(one)) for form, one in items.items()}
    moved = [found["drift"][text] for found in scored] if runs else []
    timed = [timing for run in runs if (timing := results.timing(run.train)) is not None]
    return Row(
        title,
        task,
        items,
        means,
        list(scores),
        [math.log(drift["perplexity_ratio"]) for drift in moved],
        [drift["kl"] for drift in moved],
        trained[0]["trainable_parameters"] if trained else None,
        [timing["training_seconds"] for timing in timed if "training_seconds" in timing],
        [timing["peak_memory_bytes"] for timing in timed if "peak_memory_bytes" in timing],
    )
