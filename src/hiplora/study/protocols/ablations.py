"""The method without its budget, without the projection, with zero init, without gains: Table 11 and Figure 5."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hiplora.metrics import MergeInstance, sign_flip_p_value
from hiplora.recipes.protocols import Ablations
from hiplora.recipes.study import StudyMethod
from hiplora.reporting.numbers import fixed
from hiplora.reporting.study.paper import paper_value
from hiplora.reporting.study.spec import Cell, Measurement, Plot, Section, Series, Table
from hiplora.study.builder import Study
from hiplora.study.engine.jobs import Job
from hiplora.study.protocols.merges import ADDITION, Judged, MergeScores, full_merges, merge_of
from hiplora.study.protocols.rows import (
    Row,
    base_row,
    held_out,
    method_row,
    row_differences,
    row_measurements,
    score_runs,
)
from hiplora.study.protocols.show import NONE, cell, difference, form_told, marked, measurement, smallest
from hiplora.study.results import FORMS, Results
from hiplora.study.statistics import Estimate, Resampler, estimate, hierarchical, student
from hiplora.training.baselines.hiplora import OF_THE_GAINS, HipLoraMethod

NAME, TITLE = "ablations", "Ablations"
ZERO, RULE = "Zero init", "addition"


def variants(study: Study, settings: Ablations) -> list[StudyMethod]:
    """Return the full method, and it without each of its parts."""
    fields = HipLoraMethod.model_fields
    no_gains = {name: fields[name].default for name in OF_THE_GAINS} | {"principal_channel": False}
    changes: dict[str, dict[str, Any]] = {
        "Without stability budget": {"stability_mode": "none"},
        "Without residual projection": {"residual_projection": False},
        ZERO: {"init_weights": "zero"},
        "Without principal channel": no_gains,
    }
    changed = [study.variant(settings.method, title, **change) for title, change in changes.items()]
    return [study.row(settings.method), *changed]


def jobs(study: Study, settings: Ablations) -> list[Job]:
    """Score every variant's adapters, merge those of all domains, and look where the updates lie."""
    found = [study.score()]
    for row in variants(study, settings):
        found += [job for jobs in _runs(study, settings, row).values() for job in jobs]
        found += _merges(study, settings, row).values()
        found += _inspections(study, settings, row)
    return found


def section(study: Study, settings: Ablations, results: Results) -> Section:
    """Tables of scores, Retain, MergeFail and losses in both forms, and the training curves."""
    rows = variants(study, settings)
    tables: list[Table] = []
    measurements: list[Measurement] = []
    texts: list[str] = []
    for form in FORMS:
        found = _found(study, settings, results, form)
        tables.append(_table(study, settings, results, found, form))
        measurements += _measurements(study, settings, found, form)
        texts += _power(found, form)
    measurements += _losses_and_leaks(study, settings, results)
    texts.append(_zero_told(rows[0].title))
    curves = [curve for row in rows if (curve := _curve(study, settings, results, row)) is not None]
    figures = [_figure(curves)] if curves else []
    return Section(NAME, TITLE, texts, tables, figures, measurements, list(results.missing))


@dataclass(frozen=True)
class Variant:
    """A variant's scores, and what failed of its merges (None where none are asked for)."""

    row: Row
    merges: Judged | None


def _domains(study: Study, settings: Ablations) -> list[str]:
    return list(settings.domains or study.recipe.domains)


def _runs(study: Study, settings: Ablations, row: StudyMethod) -> Mapping[str, Sequence[Job]]:
    like = study.row(settings.method)
    return score_runs(study, row, study.seeds(settings), settings.domains, like)


def _adapters(study: Study, settings: Ablations, row: StudyMethod) -> list[Job]:
    return [job.needs["adapter"] for jobs in _runs(study, settings, row).values() for job in jobs]


def _merges(study: Study, settings: Ablations, row: StudyMethod) -> dict[MergeInstance, Job]:
    """The merges of all domains, one a seed; none of a single domain."""
    domains, like = _domains(study, settings), study.row(settings.method)
    if not settings.merge or len(domains) < 2:
        return {}
    return {
        instance: merge_of(study, row, instance, RULE, ADDITION[RULE], like=like)
        for instance in full_merges(study, study.seeds(settings), domains)
    }


def _inspections(study: Study, settings: Ablations, row: StudyMethod) -> list[Job]:
    """Looks at the protected directions themselves, which are the leading ones where the basis is the weight's."""
    method = study.row(settings.method).method
    rank = getattr(method, "principal_rank", None)
    if getattr(method, "basis", "") != "weight" or not isinstance(rank, int):
        return []
    return [study.inspect(adapter, rank) for adapter in _adapters(study, settings, row)]


def _found(study: Study, settings: Ablations, results: Results, form: str) -> list[Variant]:
    """The full method first, then every variant all of whose jobs are there; none before the full method is."""
    draws, like = Resampler(), study.row(settings.method)
    found: list[Variant] = []
    if base_row(study, results, form, draws) is None:
        return found
    for row in variants(study, settings):
        scored = method_row(study, row.title, _runs(study, settings, row), results, form, draws)
        merges, judged = _merges(study, settings, row), None
        if merges:
            scores = MergeScores(study, results, form, draws)
            judged = scores.judged(row, merges, RULE, [settings.tau], like)
        if scored is not None and (judged is not None or not merges):
            found.append(Variant(scored, judged))
        elif not found:
            return []
    return found


def _table(study: Study, settings: Ablations, results: Results, found: Sequence[Variant], form: str) -> Table:
    domains = _domains(study, settings)
    by_title = {row.title: row for row in variants(study, settings)}
    lines = []
    for place, one in enumerate(found):
        title = one.row.title
        cells = [cell(estimate(one.row.domains[d], one.row.by_seed[d])) for d in domains]
        for column, values, by_seed in (
            ("Downstream", one.row.mean, one.row.mean_by_seed),
            ("Retain", one.row.retain, one.row.retain_by_seed),
        ):
            cells.append(cell(estimate(values, by_seed), _paper(title, column, place, form)))
        cells.append(Cell(_p_value(one.row, found[0].row) if place else None, digits=3))
        fails = None if one.merges is None else estimate(one.merges.share(0))
        cells.append(cell(fails, _paper(title, "MergeFail", place, form)))
        cells += _training_cells(study, settings, results, by_title[title])
        lines.append((title, cells))
    count = len(domains)
    titles = [study.recipe.domains[domain].title for domain in domains]
    columns = [
        "Variant",
        *titles,
        "Downstream",
        "Retain",
        "Retain p",
        "MergeFail",
        "Held-out loss",
        "Leak, %",
    ]
    merges = len(study.seeds(settings))
    note = (
        f"{form_told(form)}, each domain by its own adapter; downstream is their mean, Retain the mean drop on the "
        "other domains, its p that of a sign-flip test over items against the full method. MergeFail: of "
        f"{merges} merges by addition, one a seed, those in which a task keeps less than τ = {settings.tau:g} of its "
        "score. Held-out loss: nats a learned token. Leak: share of the update's energy that is on one protected side "
        "only, which gains cannot cause. All variants train at the full method's learning rate. ±: standard deviation "
        "over seeds. Brackets: 95 % intervals over items."
    )
    best = dict.fromkeys(range(count + 1), "high")
    best |= dict.fromkeys((count + 1, count + 3, count + 4), "low")
    return Table(f"{NAME}-{form}", f"Ablations: {form}", columns, marked(lines, best) if lines else [], note)


def _p_value(row: Row, full: Row) -> float:
    """Of "neither retains more": signs flipped of the items' differences, each item with its mean over the seeds."""
    return sign_flip_p_value([row.retain_items], [full.retain_items])


def _paper(title: str, column: str, place: int, form: str) -> float | None:
    if form != "accuracy":
        return None
    return paper_value("ablations", title if place else "HiP-LoRA", column)


def _training_cells(study: Study, settings: Ablations, results: Results, row: StudyMethod) -> list[Cell]:
    """A variant's held-out loss after training, and its leak, as far as they are there."""
    loss, leak = _loss(study, settings, results, row), _leak(study, settings, results, row)
    return [Cell(loss, digits=3), NONE if leak is None else Cell(100 * leak, digits=2)]


def _loss(study: Study, settings: Ablations, results: Results, row: StudyMethod) -> float | None:
    trained = [results.get(job) for job in _adapters(study, settings, row)]
    return held_out([one for one in trained if one is not None])[1]


def _leak(study: Study, settings: Ablations, results: Results, row: StudyMethod) -> float | None:
    """The mean over runs of the share of the energy that reads or writes protected directions, but not both."""
    shares = []
    for job in _inspections(study, settings, row):
        if (found := results.get(job)) is None:
            return None
        energies = [one["norm"] ** 2 for one in found["modules"]]
        leaks = [max(0.0, one["left"] + one["right"] - 2 * one["both"]) for one in found["modules"]]
        shares.append(float(np.dot(leaks, energies) / sum(energies)) if sum(energies) else 0.0)
    return float(np.mean(shares)) if shares else None


def _measurements(
    study: Study, settings: Ablations, found: Sequence[Variant], form: str
) -> Iterator[Measurement]:
    seeds, setting = len(study.seeds(settings)), {"tau": settings.tau, "rule": RULE}
    for one in found:
        yield from row_measurements(NAME, one.row, form)
        yield measurement(
            NAME, one.row.title, "mean score", estimate(one.row.mean), one.row.jobs, form=form, unit="%", seeds=seeds
        )  # fmt: skip
        if one is not found[0]:
            p, used = Estimate(_p_value(one.row, found[0].row)), [*one.row.jobs, *found[0].row.jobs]
            full = {"minus": found[0].row.title}
            yield measurement(NAME, one.row.title, "retain p", p, used, form=form, setting=full, seeds=seeds)
    yield from row_differences(NAME, [one.row for one in found], form)
    judged = [one.merges for one in found if one.merges is not None]
    for merges in judged:
        title = merges.title
        wide = hierarchical({title: [merges.verdicts(0)]})[title]
        told = {**setting, "merges": merges.failed.shape[1]}
        yield measurement(
            NAME, title, "merge fail", estimate(merges.share(0)), merges.jobs, wide=wide, form=form, unit="%",
            setting=told, seeds=seeds,
        )  # fmt: skip
        if merges is not judged[0]:
            here, there = ((x.title, x.share(0), x.jobs) for x in (merges, judged[0]))
            by_seed = merges.verdicts(0), judged[0].verdicts(0)  # a merge a seed
            yield difference(
                NAME, "merge fail", here, there, by_seed=by_seed, form=form, setting=told, seeds=seeds
            )


def _losses_and_leaks(study: Study, settings: Ablations, results: Results) -> Iterator[Measurement]:
    seeds = len(study.seeds(settings))
    for row in variants(study, settings):
        loss, leak = _loss(study, settings, results, row), _leak(study, settings, results, row)
        if loss is not None:
            used = _adapters(study, settings, row)
            yield measurement(
                NAME, row.title, "held-out loss", Estimate(loss), used, unit="nats/token", seeds=seeds
            )
        if leak is not None:
            used = _inspections(study, settings, row)
            yield measurement(NAME, row.title, "leak", Estimate(leak), used, unit="fraction", seeds=seeds)
    yield from _convergence(study, settings, results)


def _convergence(study: Study, settings: Ablations, results: Results) -> Iterator[Measurement]:
    """Each variant's training loss, mean over the steps, minus the full method's: above none it learns more slowly.

    The interval is Student's t over the seeds.
    """
    full, *others = variants(study, settings)
    there = _training_losses(study, settings, results, full)
    for row in others:
        here = _training_losses(study, settings, results, row)
        if here is None or there is None or len(here) < 2:
            continue
        apart = student(np.subtract(here, there).tolist())
        used = [*_adapters(study, settings, row), *_adapters(study, settings, full)]
        yield measurement(
            NAME, row.title, "training loss difference", apart, used, unit="nats/token",
            setting={"minus": full.title}, seeds=len(here),
        )  # fmt: skip


def _training_losses(
    study: Study, settings: Ablations, results: Results, row: StudyMethod
) -> list[float] | None:
    """A variant's training loss of each seed, mean over steps and domains; None while a run is missing."""
    by_domain = []
    for jobs in _runs(study, settings, row).values():
        trained = [results.get(job.needs["adapter"]) for job in jobs]
        known = [one for one in trained if one is not None]
        if len(known) < len(trained):
            return None
        by_domain.append([float(np.mean([loss for _, loss in one["curve"]])) for one in known])
    return np.mean(by_domain, axis=0).tolist()


def _power(found: Sequence[Variant], form: str) -> Iterator[str]:
    retain, mean = (
        smallest([value(one.row) for one in found])
        for value in (lambda row: row.retain, lambda row: row.mean)
    )
    if retain is None or mean is None:
        return
    told = ", ".join(f"{one.row.title} {fixed(one.row.retain[0], 1)}" for one in found)
    yield (
        f"Retain by {form}, in pp: {told}. A difference between two variants can be told from none if it is larger "
        f"than about {retain:.1f} pp in Retain and {mean:.1f} pp in the downstream mean."
    )


def _zero_told(full: str) -> str:
    return (
        f"{ZERO} trains the gains only: with both low-rank factors of {full} at zero, the gradient of each is zero, so "
        "they stay there. What that row shows is the principal channel alone."
    )


def _curve(study: Study, settings: Ablations, results: Results, row: StudyMethod) -> Series | None:
    """The loss at each step, mean over domains and seeds; None while a run is missing."""
    curves = [
        None if found is None else {int(step): float(loss) for step, loss in found["curve"]}
        for found in map(results.get, _adapters(study, settings, row))
    ]
    known = [curve for curve in curves if curve is not None]
    if len(known) < len(curves):
        return None
    steps = sorted(set.intersection(*map(set, known)))
    return Series(row.title, steps, [float(np.mean([curve[step] for curve in known])) for step in steps])


def _figure(curves: Sequence[Series]) -> Plot:
    note = "Mean over domains and seeds of the loss on the batch of each logged step."
    return Plot(
        f"{NAME}-dynamics",
        "Training with and without each part",
        "optimizer step",
        "training loss (nats a token)",
        curves,
        note=note,
    )
