"""A method's row: its scores by each domain's own adapter, their mean, and Retain (Eq. 11), item by item."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hiplora.metrics import retain
from hiplora.recipes.study import StudyMethod
from hiplora.reporting.study.spec import Measurement
from hiplora.study.builder import Study
from hiplora.study.engine.jobs import Job
from hiplora.study.protocols.show import difference, measurement
from hiplora.study.results import Results
from hiplora.study.statistics import Draws, Resampler, estimate, hierarchical, over_seeds

Runs = Mapping[str, Sequence[Job]]  # domain of the adapters → the jobs that score them, one a seed
Scores = Mapping[str, Mapping[str, Sequence[Sequence[float]]]]  # [trained on][scored on][seed][item]


@dataclass(frozen=True)
class Row:
    """A method's scores with their replicates: of each domain by its own adapter, and Retain.

    `retain_items` has what each item of the tasks adds to Retain, which is their mean.
    """

    title: str
    domains: dict[str, Draws]
    by_seed: dict[str, list[float]]
    items: Mapping[str, Sequence[Sequence[float]]]
    retain: Draws
    retain_by_seed: list[float]
    retain_items: NDArray[np.float64]
    jobs: list[Job]

    @property
    def mean(self) -> Draws:
        """The mean over the domains."""
        return np.mean(list(self.domains.values()), axis=0)

    @property
    def mean_by_seed(self) -> list[float]:
        """The mean over the domains of each seed's adapters, in per cent; none of the base."""
        return np.mean(list(self.by_seed.values()), axis=0).tolist() if self.by_seed else []


def score_runs(
    study: Study,
    row: StudyMethod,
    seeds: Sequence[int],
    domains: Sequence[str] | None = None,
    like: StudyMethod | None = None,
) -> Runs:
    """Return the jobs that score a method's adapters of some domains (all, if None) on the tasks of all domains."""
    return {
        domain: [study.score(study.adapter(row, domain, seed, like=like)) for seed in seeds]
        for domain in domains or study.recipe.domains
    }


def base_row(study: Study, results: Results, form: str, draws: Resampler) -> Row | None:
    """Return the base model's row, None while its scores are missing."""
    base = _base(study, results, form)
    if base is None:
        return None
    domains = {domain: draws.mean(_task(study, domain), items) for domain, items in base.items()}
    nothing = np.zeros(len(next(iter(domains.values()))))
    items = {domain: [values] for domain, values in base.items()}
    return Row("Base model", domains, {}, items, nothing, [], np.zeros(0), [study.score()])


def method_row(
    study: Study, title: str, runs: Runs, results: Results, form: str, draws: Resampler
) -> Row | None:
    """Return a method's row, None while one of its runs or the base is missing."""
    base, scores = _base(study, results, form), _scores(study, runs, results, form)
    if base is None or scores is None:
        return None
    tasks = {domain: _task(study, domain) for domain in base}
    own = {domain: found[domain] for domain, found in scores.items()}
    apart = [(domain, other) for domain in scores for other in base if other != domain]
    lost = [(other, np.subtract(base[other], over_seeds(scores[domain][other]))) for domain, other in apart]
    drops = [draws.mean(tasks[other], items) for other, items in lost]
    domains = {domain: draws.mean(tasks[domain], over_seeds(items)) for domain, items in own.items()}
    by_seed = _retain_by_seed(base, scores) if apart else []
    return Row(
        title,
        domains,
        {domain: [float(np.mean(values)) for values in items] for domain, items in own.items()},
        own,
        np.mean(drops, axis=0) if drops else np.zeros(len(next(iter(domains.values())))),
        by_seed,
        _shares(base, lost),
        [job for jobs in runs.values() for job in jobs],
    )


def _shares(
    base: Mapping[str, Sequence[float]], lost: Sequence[tuple[str, NDArray[np.float64]]]
) -> NDArray[np.float64]:
    """Return what each item of the tasks adds to Retain, the mean of the tasks' mean losses."""
    found = {domain: np.zeros(len(items)) for domain, items in base.items()}
    for domain, items in lost:
        found[domain] += items / len(items) / len(lost)
    each = np.concatenate(list(found.values()))
    return each * len(each)


def _retain_by_seed(base: Mapping[str, Sequence[float]], scores: Scores) -> list[float]:
    """Retain of each seed's adapters, mean over the domains that they were trained on."""
    before = _means(base)
    found = []
    for seed in range(len(next(iter(next(iter(scores.values())).values())))):
        after = {
            domain: _means({other: items[seed] for other, items in tasks.items()})
            for domain, tasks in scores.items()
        }
        found.append(float(np.mean([retain(before, means, domain) for domain, means in after.items()])))
    return found


def _means(items: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {domain: float(np.mean(values)) for domain, values in items.items()}


def row_measurements(name: str, row: Row, form: str, is_base: bool = False) -> Iterator[Measurement]:
    """Yield a row's scores by domain and, of a method, its Retain."""
    for domain, draws in row.domains.items():
        count = len(row.items[domain])
        wide = hierarchical({row.title: row.items[domain]})[row.title] if count > 1 else None
        found = estimate(draws, row.by_seed.get(domain, ()))
        items = len(row.items[domain][0])
        yield measurement(
            name, row.title, "score", found, row.jobs, wide=wide, domain=domain, form=form, seeds=count, items=items,
            unit="%",
        )  # fmt: skip
    if not is_base:
        found, seeds = estimate(row.retain, row.retain_by_seed), len(row.retain_by_seed)
        yield measurement(name, row.title, "retain", found, row.jobs, form=form, unit="pp", seeds=seeds)


def row_differences(name: str, rows: Sequence[Row], form: str) -> Iterator[Measurement]:
    """Yield the paired differences of Retain and of the mean score: every method minus each one before it."""
    for place, row in enumerate(rows):
        for against in rows[:place]:
            for metric, here, there, by_seed in (
                ("retain", row.retain, against.retain, (row.retain_by_seed, against.retain_by_seed)),
                ("mean score", row.mean, against.mean, (row.mean_by_seed, against.mean_by_seed)),
            ):
                sides = (row.title, here, row.jobs), (against.title, there, against.jobs)
                seeds = len(row.mean_by_seed)
                yield difference(name, metric, *sides, by_seed=by_seed, form=form, seeds=seeds)


def held_out(trained: Sequence[Mapping[str, Any]]) -> tuple[float | None, float | None]:
    """Return the mean loss on held-out rows before and after some trainings, by their results; None without any."""
    losses = [
        (one["held_out_before"], one["held_out_after"])
        for one in trained
        if one["held_out_after"] is not None
    ]
    if not losses:
        return None, None
    before, after = np.mean(losses, axis=0)
    return float(before), float(after)


def _task(study: Study, domain: str) -> str:
    return study.recipe.domains[domain].task


def _base(study: Study, results: Results, form: str) -> dict[str, list[float]] | None:
    found = {
        domain: results.items(study.score(), _task(study, domain), form) for domain in study.recipe.domains
    }
    known = {domain: items for domain, items in found.items() if items is not None}
    return known if len(known) == len(found) else None


def _scores(study: Study, runs: Runs, results: Results, form: str) -> Scores | None:
    scores: dict[str, dict[str, list[list[float]]]] = {}
    whole = True
    for domain, jobs in runs.items():
        scores[domain] = {other: [] for other in study.recipe.domains}
        for job in jobs:
            for other, found in scores[domain].items():
                items = results.items(job, _task(study, other), form)
                whole = whole and items is not None
                found.append(items or [])
    return scores if whole else None
