"""What the price λ of the gains buys: downstream score against Retain, as in Figure 3 of the paper."""

from collections.abc import Iterator, Sequence

import numpy as np

from hiplora.recipes.protocols import LambdaCurve
from hiplora.recipes.study import StudyMethod
from hiplora.reporting.numbers import fixed
from hiplora.reporting.study.spec import Cell, Measurement, Plot, Section, Series, Table
from hiplora.study.builder import Study
from hiplora.study.engine.jobs import Job
from hiplora.study.protocols.rows import (
    Row,
    Runs,
    held_out,
    method_row,
    row_differences,
    row_measurements,
    score_runs,
)
from hiplora.study.protocols.show import cell, form_told, marked, measurement, smallest
from hiplora.study.results import FORMS, Results
from hiplora.study.statistics import Resampler, estimate

NAME, TITLE = "lambda-curve", "Trade-off over λ"
Priced = tuple[float, Row]


def jobs(study: Study, settings: LambdaCurve) -> list[Job]:
    """Score the base, and the adapter of every λ, domain and seed."""
    runs = [_runs(study, settings, price) for price in settings.values]
    return [study.score(), *(job for one in runs for found in one.values() for job in found)]


def section(study: Study, settings: LambdaCurve, results: Results) -> Section:
    """A table of scores and Retain over λ in both forms, and the curve of the likelihoods."""
    tables: list[Table] = []
    figures: list[Plot] = []
    measurements: list[Measurement] = []
    texts: list[str] = []
    for form in FORMS:
        found = _rows(study, settings, results, form)
        tables.append(_table(study, settings, results, found, form))
        measurements += _measurements(study, settings, found, form)
        texts += _texts(found, form)
        if form == "likelihood" and found:
            figures.append(_figure(study, settings, found))
    return Section(NAME, TITLE, texts, tables, figures, measurements, list(results.missing))


def _priced(study: Study, settings: LambdaCurve, price: float) -> StudyMethod:
    title = f"{study.row(settings.method).title}, λ = {price:g}"
    return study.variant(settings.method, title, stability_weight=price)


def _runs(study: Study, settings: LambdaCurve, price: float) -> Runs:
    row, like = _priced(study, settings, price), study.row(settings.method)
    return score_runs(study, row, study.seeds(settings), settings.domains, like)


def _rows(study: Study, settings: LambdaCurve, results: Results, form: str) -> list[Priced]:
    draws, found = Resampler(), []
    for price in settings.values:
        title, runs = _priced(study, settings, price).title, _runs(study, settings, price)
        row = method_row(study, title, runs, results, form, draws)
        found += [(price, row)] if row is not None else []
    return found


def _table(
    study: Study, settings: LambdaCurve, results: Results, found: Sequence[Priced], form: str
) -> Table:
    domains = list(settings.domains or study.recipe.domains)
    lines = []
    for price, row in found:
        trained = [results.get(job.needs["adapter"]) for job in row.jobs]
        loss = held_out([one for one in trained if one is not None])[1]
        cells = [cell(estimate(row.domains[domain], row.by_seed[domain])) for domain in domains]
        retain = cell(estimate(row.retain, row.retain_by_seed))
        lines.append(
            (f"{price:g}", [*cells, cell(estimate(row.mean, row.mean_by_seed)), retain, Cell(loss, digits=3)])
        )
    titles = [study.recipe.domains[domain].title for domain in domains]
    note = (
        f"{form_told(form)}, of {study.row(settings.method).title} at each λ, each domain by its own adapter. Retain: "
        "mean drop on the other domains, in percentage points. Held-out loss: nats a learned token. ±: standard "
        "deviation over seeds. Brackets: 95 % intervals over items. The paper's curve has no numbers."
    )
    best = dict.fromkeys(range(len(domains) + 1), "high")
    best |= dict.fromkeys((len(domains) + 1, len(domains) + 2), "low")
    columns = ["λ", *titles, "Downstream", "Retain", "Held-out loss"]
    return Table(f"{NAME}-{form}", f"Scores over λ: {form}", columns, marked(lines, best), note)


def _measurements(
    study: Study, settings: LambdaCurve, found: Sequence[Priced], form: str
) -> Iterator[Measurement]:
    seeds = len(study.seeds(settings))
    for price, row in found:
        setting = {"lambda": price}
        by_seed = np.mean(list(row.by_seed.values()), axis=0).tolist()
        mean = estimate(row.mean, by_seed)
        yield from row_measurements(NAME, row, form)
        yield measurement(
            NAME, row.title, "mean score", mean, row.jobs, form=form, unit="%", setting=setting, seeds=seeds
        )
    yield from row_differences(NAME, [row for _, row in found], form)
    if len(found) > 1:
        (low, first), (high, last) = min(found, key=_price), max(found, key=_price)
        by_seed = np.subtract(last.retain_by_seed, first.retain_by_seed).tolist()
        change, used = estimate(last.retain - first.retain, by_seed), [*first.jobs, *last.jobs]
        setting = {"from": low, "to": high}
        title = study.row(settings.method).title
        yield measurement(
            NAME, title, "retain change", change, used, form=form, unit="pp", setting=setting, seeds=seeds
        )


def _price(found: Priced) -> float:
    return found[0]


def _texts(found: Sequence[Priced], form: str) -> Iterator[str]:
    if len(found) < 2:
        return
    least = smallest([row.retain for _, row in found])
    (low, first), (high, last) = min(found, key=_price), max(found, key=_price)
    change, mean = last.retain[0] - first.retain[0], last.mean[0] - first.mean[0]
    yield (
        f"By {form}, from λ = {low:g} to λ = {high:g} Retain changes by {fixed(change, 1)} pp and the downstream mean "
        f"by {fixed(mean, 1)} pp. A difference in Retain between two λ can be told from none if it is larger than "
        f"about {least or 0:.1f} pp."
    )


def _figure(study: Study, settings: LambdaCurve, found: Sequence[Priced]) -> Plot:
    found = sorted(found, key=_price)
    retain, mean = (
        [estimate(one) for one in kept] for kept in zip(*((r.retain, r.mean) for _, r in found), strict=True)
    )
    series = Series(
        study.row(settings.method).title,
        [one.value for one in mean],
        [one.value for one in retain],
        low=[one.low or 0.0 for one in retain],
        high=[one.high or 0.0 for one in retain],
        x_low=[one.low or 0.0 for one in mean],
        x_high=[one.high or 0.0 for one in mean],
        labels=[f"λ = {price:g}" for price, _ in found],
    )
    return Plot(
        NAME,
        "What was learned, and what it cost elsewhere, over λ",
        "mean likelihood of the right answer, own domain (%)",
        "Retain (pp, lower is better)",
        [series],
    )
