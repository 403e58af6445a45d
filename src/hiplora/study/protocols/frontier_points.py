"""The points of the frontiers: what each method learned at each rate, and how far it drifted, seed by seed."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hiplora.recipes.protocols import Frontier as Settings
from hiplora.study.builder import Study
from hiplora.study.engine.jobs import Job
from hiplora.study.protocols.frontiers import Frontier, Mark
from hiplora.study.results import Results, drift
from hiplora.study.statistics import Draws, Resampler, over_seeds

OVER = "all texts"  # the geometric mean over the texts unlike the reference's calibration text
OWN, PLAIN, RIVAL = "own", "plain", "rival"
LOSS, LIKELIHOOD = "loss", "likelihood"
FLOOR = 1e-9  # nats a token: below it a divergence is rounding, and has no logarithm to speak of


@dataclass(frozen=True)
class Point:
    """A method at one rate and number of steps (None: all), seed by seed.

    `drifts` are KL in nats a token by text, `OVER` among them; `likelihood` is the own task's in per cent, `drop` the
    mean fall of the other tasks' likelihoods below the base's in percentage points; None where they are not scored.
    `untrained` is the mean held-out loss before the first step.
    """

    rate: float
    steps: int | None
    losses: list[float]
    untrained: float
    drifts: dict[str, list[float]]
    likelihood: list[float] | None
    drop: Draws | None
    drop_by_seed: list[float]
    jobs: list[Job]

    @property
    def loss(self) -> float:
        """The mean held-out loss over the seeds, nats a learned token."""
        return float(np.mean(self.losses))

    @property
    def learned(self) -> bool:
        """Whether the adapters are better at what they were trained on than the untrained model is."""
        return self.loss < self.untrained

    def drift(self, text: str) -> float:
        """The geometric mean of a drift over the seeds."""
        return float(np.exp(np.mean(np.log(np.maximum(self.drifts[text], FLOOR)))))

    def mark(self, view: str, text: str) -> Mark | None:
        """Return the point as a frontier has it: by loss or by likelihood, against the drift on a text."""
        x = self.losses if view == LOSS else self.likelihood
        if x is None or text not in self.drifts:
            return None
        learned = np.asarray(x) if view == LOSS else -np.asarray(x)
        drifts = np.log(np.maximum(self.drifts[text], FLOOR))
        return Mark(self.rate, math.inf if self.steps is None else self.steps, learned, drifts)


@dataclass(frozen=True)
class Curve:
    """A method's points in one domain; `kind` is `OWN`, `PLAIN` or `RIVAL`.

    Own is the reference and what else has its basis; the paper's HiP-LoRA is a rival like others.
    """

    name: str
    title: str
    kind: str
    points: list[Point]

    @property
    def best(self) -> Point:
        """The full training with the lowest mean held-out loss; the best of all points, if none is whole."""
        return min(
            [point for point in self.points if point.steps is None] or self.points, key=lambda p: p.loss
        )

    def frontier(self, view: str, text: str) -> Frontier | None:
        """Return the lower envelope of the points, None where none has what is asked for."""
        marks = [mark for point in self.points if (mark := point.mark(view, text)) is not None]
        return Frontier(marks) if marks else None


def scoring_jobs(study: Study, settings: Settings, domain: str, method: str) -> dict[tuple, list[Job]]:
    """Return (rate, steps) → the jobs that score a method's adapters, one a seed."""
    row, tasks = study.row(method), settings.tasks or None
    stops = settings.early.get(method, ()) if domain in (settings.early_domains or (domain,)) else ()
    return {
        (rate, steps): [
            study.score(study.adapter(row, domain, seed, lr=rate, steps=steps), tasks, drift=True)
            for seed in study.seeds(settings)
        ]
        for steps in (None, *stops)
        for rate in settings.rates
    }


def base_job(study: Study, settings: Settings) -> Job:
    """Return the job that scores the base model on the same tasks."""
    return study.score(None, settings.tasks or None)


def curves(study: Study, settings: Settings, results: Results, domain: str) -> list[Curve]:
    """Return the methods of a domain with the points all of whose seeds are there; none without any."""
    base, draws = results.get(base_job(study, settings)), Resampler()
    found = []
    for method in settings.domains[domain]:
        points = []
        for (rate, steps), jobs in scoring_jobs(study, settings, domain, method).items():
            trained = [one for job in jobs if (one := results.get(job.needs["adapter"])) is not None]
            if any(results.diverged(job.needs["adapter"]) for job in jobs):
                continue  # no point of a frontier, and nothing to wait for
            scored = [one for job in jobs if (one := results.get(job)) is not None]
            losses = [float(one["held_out_after"]) for one in trained]
            if not len(scored) == len(losses) == len(jobs) or not all(map(math.isfinite, losses)):
                continue  # not all there
            drifts = _drifts(unlike(study, settings), [drift(one) for one in scored])
            untrained = float(np.mean([one["held_out_before"] for one in trained]))
            scores = _scores(study, settings, domain, base, scored, draws)
            points.append(Point(rate, steps, losses, untrained, drifts, *scores, jobs))
        if points:
            found.append(Curve(method, study.row(method).title, kind_of(study, settings, method), points))
    return found


def unlike(study: Study, settings: Settings) -> list[str]:
    """Return the drift texts that are not of the file that calibrated the reference; all, if none is left."""
    drift_texts = study.recipe.evaluation.drift
    texts = drift_texts.texts if drift_texts is not None else {}
    calibration = getattr(study.row(settings.reference).method, "calibration_text", None)
    return [text for text, source in texts.items() if source.partition(":")[0] != calibration] or list(texts)


def at_the_edge(curve: Curve, rates: Sequence[float]) -> bool:
    """Return whether a method's best rate is the lowest or highest of the grid: a wider one may have a better."""
    return curve.best.rate in (min(rates), max(rates))


def kind_of(study: Study, settings: Settings, method: str) -> str:
    """Return whether a method is `OWN`, `PLAIN` or `RIVAL`."""
    if method in settings.plain:
        return PLAIN
    found = study.row(method).method
    is_own = found.name == "hiplora" and found.preset != "paper"
    return OWN if is_own or method == settings.reference else RIVAL


def _drifts(apart: Sequence[str], found: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    if not all(found):
        return {}
    drifts = {text: [one[text] for one in found] for text in found[0]}
    logs = [np.log(np.maximum(drifts[text], FLOOR)) for text in apart]
    return {**drifts, OVER: np.exp(np.mean(logs, axis=0)).tolist()}


def tasks_of(study: Study, settings: Settings) -> Mapping[str, int | None]:
    """Return the tasks that every point is scored on, with their numbers of items."""
    return settings.tasks or study.tasks


def _scores(
    study: Study, settings: Settings, domain: str, base: Mapping | None, scored: Sequence, draws: Resampler
) -> tuple[list[float] | None, Draws | None, list[float]]:
    """The own task's likelihood by seed; the mean drop on the tasks of other domains, whole and by seed."""
    own = study.recipe.domains[domain]
    likelihood = None
    if all(own.task in one["tasks"] for one in scored):
        likelihood = [float(np.mean(one["tasks"][own.task]["likelihood"])) for one in scored]
    others = list(_others(tasks_of(study, settings), own.tasks, base, scored))
    if base is None or not others:
        return likelihood, None, []
    drops = {
        task: np.subtract(
            base["tasks"][task]["likelihood"], [one["tasks"][task]["likelihood"] for one in scored]
        )
        for task in others
    }
    whole = np.mean([draws.mean(task, over_seeds(found)) for task, found in drops.items()], axis=0)
    return likelihood, whole, np.mean([found.mean(axis=1) for found in drops.values()], axis=0).tolist()


def _others(tasks: Mapping, own: Mapping, base: Mapping | None, scored: Sequence) -> Iterator[str]:
    for task in tasks:
        if task not in own and base is not None and all(task in one["tasks"] for one in (base, *scored)):
            yield task
