"""The metrics that a table of merges reports: each domain's score, and pass@k where programs are sampled."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hiplora.errors import ConfigError
from hiplora.evaluation.suite import own_tasks, task_samples, task_settings
from hiplora.metrics import pass_at_k
from hiplora.recipes.protocols import Merging
from hiplora.study.builder import Study
from hiplora.study.results import items

PASSES = (1, 5, 10)


@dataclass(frozen=True)
class Reported:
    """A metric of a domain: a task's score, or pass@k of it; `further`: the task is none of the domain's own."""

    title: str
    domain: str
    task: str
    k: int | None = None
    further: bool = False

    def items(self, found: dict[str, Any], form: str) -> list[float] | None:
        """Return its scores item by item in per cent, from a result of `evaluate` or `merge`.

        A task's score is pass@1, the share of its n samples that pass: from that follows pass@k of each item.
        """
        scores = items(found, self.task, form)
        if self.k in (None, 1) or scores is None:
            return scores
        samples = task_samples(self.task)
        return [100 * pass_at_k(samples, round(score * samples / 100), self.k or 1) for score in scores]


def reported(study: Study, settings: Merging, form: str) -> list[Reported]:
    """Return the metrics of a form: pass rates have no likelihood."""
    found = []
    for name, domain in study.recipe.domains.items():
        own = domain.task
        found.append(Reported(domain.title, name, own))
        if form == "accuracy":
            found += _passes(domain.title, name, own, PASSES[1:], further=False)
            for task in passing(study, settings, name):
                found += _passes(domain.title, name, task, PASSES, further=True)
    return found


def passing(study: Study, settings: Merging, domain: str) -> dict[str, int | None]:
    """Return the further tasks of a domain, those that are made of the same file as one of its own.

    Raises:
        ConfigError: a task of `passing` is of no domain.
    """
    files = {name: {_file(task) for task in one.tasks} for name, one in study.recipe.domains.items()}
    for task in settings.passing:
        if not any(_file(task) in known for known in files.values()):
            raise ConfigError(
                f"protocols.merging.passing: task {task!r} is of no domain; name one that is made of the same file as "
                "a domain's own, as humaneval_10 is of humaneval, or remove it"
            )
    own = study.recipe.domains[domain].task
    return {
        task: count
        for task, count in settings.passing.items()
        if _file(task) in files[domain] and task != own
    }


def _passes(title: str, domain: str, task: str, passes: Sequence[int], further: bool) -> list[Reported]:
    samples = task_samples(task)
    return [Reported(f"{title} pass@{k}", domain, task, k, further) for k in passes if k <= samples]


def _file(task: str) -> str:
    return str(task_settings(task)["file"]) if task in own_tasks() else task
