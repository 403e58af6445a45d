"""One adapter trained on one domain after the other: the whole matrix of scores, AvgAcc and Forgetting (C.4)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hiplora.recipes.protocols import Continual
from hiplora.reporting.study.paper import paper_value
from hiplora.reporting.study.spec import Cell, Figure, Grid, Matrix, Measurement, Section, Table
from hiplora.study.builder import Study
from hiplora.study.engine.jobs import Job
from hiplora.study.protocols.show import cell, difference, form_told, marked, measurement, smallest
from hiplora.study.results import FORMS, Results, drift
from hiplora.study.statistics import (
    Draws,
    Estimate,
    Resampler,
    estimate,
    geometric,
    over_seeds,
    ratio,
    spread,
)

NAME, TITLE = "continual", "Continual tuning"
METRICS = {
    "average accuracy": ("AvgAcc", "high"),
    "forgetting": ("Forgetting", "low"),
    "backward transfer": ("Backward transfer", "high"),
    "learned accuracy": ("Just after training", "high"),
}


def jobs(study: Study, settings: Continual) -> list[Job]:
    """Score the base, and every stage of every method and seed on the tasks of all domains."""
    stages = [job for method in settings.methods for jobs in _stages(study, settings, method) for job in jobs]
    return [study.score(), *stages]


def section(study: Study, settings: Continual, results: Results) -> Section:
    """Tables of the paper's two numbers in both forms, the matrices, and the drift after the last stage."""
    found = {form: _learners(study, settings, results, form) for form in FORMS}
    tables = [_table(found[form], form) for form in FORMS]
    measurements = [one for form in FORMS for one in _measurements(study, found[form], form)]
    drifts = _drifts(study, settings, results)
    if drifts:
        tables.append(_drift_table(drifts))
        measurements += _drift_measurements(study, settings, drifts)
    figures = [_matrices(study, settings, found[form], form) for form in FORMS if found[form]]
    texts = [text for form in FORMS for text in _texts(found[form], form)]
    return Section(NAME, TITLE, texts, tables, figures, measurements, list(results.missing))


@dataclass(frozen=True)
class Learner:
    """A method's scores: `matrix[t][i]` on task i after stage t with its replicates, and each seed's, (seed, t, i)."""

    title: str
    matrix: NDArray[np.float64]  # (stages, tasks, 1 + replicates)
    by_seed: NDArray[np.float64]
    jobs: list[Job]

    def metric(self, name: str) -> Draws:
        """Return one of `METRICS` with its replicates."""
        return _metrics(self.matrix)[name]

    def seeds(self, name: str) -> list[float]:
        """Return one of `METRICS` a seed."""
        return [float(_metrics(matrix[:, :, None])[name][0]) for matrix in self.by_seed]


def _metrics(matrix: NDArray[np.float64]) -> dict[str, Draws]:
    """The paper's numbers for every replicate at once: `hiplora.metrics.continual`, vectorised."""
    last, before = matrix[-1], matrix[:-1, :-1]
    just_trained = np.stack([matrix[stage, stage] for stage in range(len(matrix))])
    return {
        "average accuracy": last.mean(axis=0),
        "forgetting": (before.max(axis=0) - last[:-1]).mean(axis=0),
        "backward transfer": (last - just_trained)[:-1].mean(axis=0),
        "learned accuracy": just_trained.mean(axis=0),
    }


def _order(study: Study, settings: Continual) -> list[str]:
    return list(settings.order or study.recipe.domains)


def _stages(study: Study, settings: Continual, method: str) -> list[list[Job]]:
    """The jobs that score a method's stages, a list of stages each seed."""
    found = []
    for seed in study.seeds(settings):
        adapter: Job | None = None
        stages = []
        for domain in _order(study, settings):
            adapter = study.adapter(study.row(method), domain, seed, start=adapter)
            stages.append(study.score(adapter))
        found.append(stages)
    return found


def _learners(study: Study, settings: Continual, results: Results, form: str) -> list[Learner]:
    """The methods all of whose stages are there."""
    draws, found = Resampler(), []
    tasks = [study.recipe.domains[domain].task for domain in _order(study, settings)]
    results.get(study.score())
    for method in settings.methods:
        stages = _stages(study, settings, method)
        items = [[[results.items(job, task, form) for task in tasks] for job in seed] for seed in stages]
        if any(one is None for seed in items for stage in seed for one in stage):
            continue
        matrix = np.array(
            [
                [
                    draws.mean(task, over_seeds([seed[stage][place] or [] for seed in items]))
                    for place, task in enumerate(tasks)
                ]
                for stage in range(len(tasks))
            ]
        )
        by_seed = np.array([[[np.mean(one or []) for one in stage] for stage in seed] for seed in items])
        used = [job for seed in stages for job in seed]
        found.append(Learner(study.row(method).title, matrix, by_seed, used))
    return found


def _table(learners: Sequence[Learner], form: str) -> Table:
    rows = []
    for one in learners:
        cells = []
        for name, (column, _) in METRICS.items():
            paper = (
                paper_value("continual", one.title, column)
                if form == "accuracy" and column in ("AvgAcc", "Forgetting")
                else None
            )
            cells.append(cell(estimate(one.metric(name)), paper))
        rows.append((one.title, cells))
    columns = ["Method", *(column for column, _ in METRICS.values())]
    best = {place: prefer for place, (_, prefer) in enumerate(METRICS.values())}
    note = (
        f"{form_told(form)}. AvgAcc: mean over the tasks after the last stage; Forgetting: mean fall from the best "
        "earlier stage, lower is better; brackets: 95 % intervals over items, each with its mean over the seeds."
    )
    return Table(f"{NAME}-{form}", f"{TITLE}: {form}", columns, marked(rows, best), note)


def _measurements(study: Study, learners: Sequence[Learner], form: str) -> Iterator[Measurement]:
    for place, one in enumerate(learners):
        seeds = len(one.by_seed)
        for name in METRICS:
            unit = "%" if "accuracy" in name else "pp"
            found = estimate(one.metric(name), one.seeds(name))
            yield measurement(NAME, one.title, name, found, one.jobs, form=form, unit=unit, seeds=seeds)
        for stage, row in enumerate(one.matrix):
            for task, draws in enumerate(row):
                setting = {"stage": stage + 1, "task": task + 1}
                found = estimate(draws)
                yield measurement(
                    NAME, one.title, "score", found, one.jobs, form=form, unit="%", seeds=seeds, setting=setting
                )  # fmt: skip
        for against in learners[:place]:
            for name in METRICS:
                sides = (
                    (one.title, one.metric(name), one.jobs),
                    (against.title, against.metric(name), against.jobs),
                )
                yield difference(NAME, name, *sides, form=form, seeds=seeds)
            yield _ratio(one, against, form)


def _ratio(one: Learner, against: Learner, form: str) -> Measurement:
    """Forgetting over another method's; where that may forget nothing, a ratio has no interval."""
    found = ratio(one.metric("forgetting"), against.metric("forgetting"))
    return measurement(
        NAME, one.title, "forgetting ratio", found, [*one.jobs, *against.jobs], form=form, unit="ratio",
        setting={"over": against.title}, seeds=len(one.by_seed),
    )  # fmt: skip


def _matrices(study: Study, settings: Continual, learners: Sequence[Learner], form: str) -> Figure:
    titles = [study.recipe.domains[domain].title for domain in _order(study, settings)]
    parts = [
        Matrix(
            f"{NAME}-matrix-{form}-{place}",
            one.title,
            [f"after {title}" for title in titles],
            titles,
            one.matrix[:, :, 0].tolist(),
            "%",
        )
        for place, one in enumerate(learners)
    ]
    note = f"{form_told(form)}, mean over the seeds: a row a stage, a column a task."
    return Grid(f"{NAME}-matrix-{form}", f"Every task after every stage: {form}", parts, note)


def _texts(learners: Sequence[Learner], form: str) -> Iterator[str]:
    if len(learners) < 2:
        return
    told = ", ".join(f"{one.title} {one.metric('forgetting')[0]:.1f}" for one in learners)
    least = smallest([one.metric("forgetting") for one in learners])
    yield (
        f"Forgetting by {form}, in pp: {told}. A difference between two methods can be told from none if it is larger "
        f"than about {least:.1f} pp."
    )


def _drifts(study: Study, settings: Continual, results: Results) -> dict[str, dict[str, list[float]]]:
    """Method → text → KL after the last stage, one a seed; methods that are whole."""
    found = {}
    for method in settings.methods:
        last = [results.get(stages[-1]) for stages in _stages(study, settings, method)]
        if all(one is not None and one["drift"] for one in last):
            kls = [drift(one) for one in last if one is not None]
            found[method] = {text: [kl[text] for kl in kls] for text in kls[0]}
    return found


def _drift_table(drifts: dict[str, dict[str, list[float]]]) -> Table:
    texts = list(next(iter(drifts.values())))
    rows = [
        (method, [Cell(1000 * float(np.mean(kl[text])), digits=2) for text in texts])
        for method, kl in drifts.items()
    ]
    note = "KL divergence from the base in thousandths of a nat a token after the last stage, mean over the seeds."
    best = dict.fromkeys(range(len(texts)), "low")
    return Table(f"{NAME}-drift", "Drift after all stages", ["Method", *texts], marked(rows, best), note)


def _drift_measurements(
    study: Study, settings: Continual, drifts: dict[str, dict[str, list[float]]]
) -> Iterator[Measurement]:
    used = {
        method: [stages[-1] for stages in _stages(study, settings, method)] for method in settings.methods
    }
    done: list[str] = []
    for method, texts in drifts.items():
        title = study.row(method).title
        for text, kl in texts.items():
            setting, seeds = {"text": text}, len(kl)
            found = Estimate(float(np.mean(kl)), sd=spread(kl))
            yield measurement(
                NAME,
                title,
                "drift",
                found,
                used[method],
                unit="nats/token",
                setting=setting,
                seeds=seeds,
            )
            for other in done:
                apart = geometric([here / there for here, there in zip(kl, drifts[other][text], strict=True)])
                over = {**setting, "over": study.row(other).title}
                both = [*used[method], *used[other]]
                yield measurement(
                    NAME, title, "drift ratio", apart, both, unit="ratio", setting=over, seeds=seeds
                )
        done.append(method)
