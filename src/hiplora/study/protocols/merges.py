"""Merges as several protocols ask for them: equal ones are one job, and what failed is judged in every replicate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hiplora.metrics import MergeInstance, fails
from hiplora.recipes.study import StudyMethod
from hiplora.study.builder import Study
from hiplora.study.engine.jobs import Job
from hiplora.study.results import Results
from hiplora.study.statistics import Draws, Resampler

_TITLES = {"ties": "TIES", "dare": "DARE", "knots": "KnOTS", "tsv": "TSV", "iso-c": "Iso-C"}
ADDITION: Mapping[str, Mapping[str, Any]] = {"addition": {}}


@dataclass(frozen=True)
class Judged:
    """The verdicts on a method's merges by a rule: `failed[threshold, merge]` and behind it that of every replicate."""

    title: str
    rule: str
    failed: NDArray[np.bool_]  # (taus, merges, 1 + replicates)
    jobs: list[Job]

    @property
    def name(self) -> str:
        """The method's and the rule's name, as a row of a table."""
        return f"{self.title}, {rule_title(self.rule)}"

    def share(self, tau: int, which: Sequence[int] | None = None) -> Draws:
        """Return MergeFail in per cent, at the threshold of this place, of all merges or `which` of them."""
        found = self.failed[tau] if which is None else self.failed[tau][list(which)]
        return 100 * found.mean(axis=0)

    def verdicts(self, tau: int) -> list[float]:
        """Return each merge's verdict in per cent: 100 where it failed."""
        return (100.0 * self.failed[tau][:, 0]).tolist()


def rule_title(rule: str) -> str:
    """Return a merge rule's name as tables have it."""
    return _TITLES.get(rule, rule)


def merge_of(
    study: Study,
    row: StudyMethod,
    instance: MergeInstance,
    rule: str,
    options: Mapping[str, Any],
    drift: bool = False,
    like: StudyMethod | None = None,
) -> Job:
    """Return the job that merges a method's adapters of some domains and seeds, scored on their own tasks.

    The merge of all domains of one seed, which several protocols read, always has its drift measured.
    """
    adapters = {domain: study.adapter(row, domain, seed, like=like) for domain, seed in instance}
    whole = len(adapters) == len(study.recipe.domains) and len({seed for _, seed in instance}) == 1
    told = " + ".join(f"{domain} {seed}" for domain, seed in instance)
    tasks = study.tasks_of(list(adapters))
    return study.merge(adapters, rule, options, tasks, drift or whole, name=f"{row.title}, {told}")


def full_merges(
    study: Study, seeds: Sequence[int], domains: Sequence[str] | None = None
) -> list[MergeInstance]:
    """Return the merges of all domains (or some), one a seed."""
    return [tuple((domain, seed) for domain in domains or study.recipe.domains) for seed in seeds]


class MergeScores:
    """The domains' scores, with their replicates, of adapters alone and of merges, in one form."""

    def __init__(self, study: Study, results: Results, form: str, draws: Resampler):
        """Take where the scores come from; each is computed once."""
        self._study, self._results, self._form, self._draws = study, results, form, draws
        self._known: dict[tuple[str, str], Draws | None] = {}

    def of(self, job: Job, domain: str) -> Draws | None:
        """Return the score of a domain's task that a job found, None where it is missing."""
        if (job.key, domain) not in self._known:
            task = self._study.recipe.domains[domain].task
            items = self._results.items(job, task, self._form)
            self._known[job.key, domain] = None if items is None else self._draws.mean(task, items)
        return self._known[job.key, domain]

    def judged(
        self,
        row: StudyMethod,
        merges: Mapping[MergeInstance, Job],
        rule: str,
        taus: Sequence[float],
        like: StudyMethod | None = None,
    ) -> Judged | None:
        """Return the verdicts on a method's merges at thresholds, None while a score is missing."""
        failed: list[list[NDArray[np.bool_]]] = []
        jobs: dict[Job, None] = {}
        for instance, job in merges.items():
            alone = {
                domain: self._study.score(self._study.adapter(row, domain, seed, like=like))
                for domain, seed in instance
            }
            single = {domain: self.of(one, domain) for domain, one in alone.items()}
            merged = {domain: self.of(job, domain) for domain in alone}
            jobs |= dict.fromkeys([job, *alone.values()])
            before = {domain: draws for domain, draws in single.items() if draws is not None}
            after = {domain: draws for domain, draws in merged.items() if draws is not None}
            if len(before) == len(after) == len(alone):
                failed.append([fails(after, before, tau) for tau in taus])
        if len(failed) < len(merges):
            return None
        return Judged(row.title, rule, np.array(failed).swapaxes(0, 1), list(jobs))


def needed(
    study: Study,
    row: StudyMethod,
    merges: Mapping[MergeInstance, Job],
    like: StudyMethod | None = None,
) -> list[Job]:
    """Return the jobs that judging merges reads: they themselves, and the adapters' own scores."""
    alone = dict.fromkeys(one for instance in merges for one in instance)
    scores = [study.score(study.adapter(row, domain, seed, like=like)) for domain, seed in alone]
    return [*scores, *merges.values()]
