"""Each method trained on each domain alone and scored on all of them: Table 1 of the paper, with Retain (Eq. 11)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from hiplora.recipes.protocols import OfMethods
from hiplora.reporting.study.paper import paper_value
from hiplora.reporting.study.spec import Cell, Measurement, Plot, Section, Series, Table
from hiplora.study.builder import Study
from hiplora.study.engine.jobs import Job
from hiplora.study.protocols.show import NONE, cell, marked, measurement
from hiplora.study.results import FORMS, Results, drift
from hiplora.study.statistics import (
    Draws,
    Estimate,
    Resampler,
    estimate,
    geometric,
    hierarchical,
    over_seeds,
    spread,
)

NAME, TITLE, PAPER = "single-task", "Single tasks", "single-task"


def jobs(study: Study, settings: OfMethods) -> list[Job]:
    """Score the base, and the adapter of every method, domain and seed."""
    return [study.score(), *(job for _, _, _, job in _runs(study, settings))]


def section(study: Study, settings: OfMethods, results: Results) -> Section:
    """Tables of the domains' scores and Retain in both forms, of the drift, and of what was trained."""
    return single_task_section(study, settings, results, NAME, TITLE, PAPER)


def single_task_section(
    study: Study, settings: OfMethods, results: Results, name: str, title: str, paper: str
) -> Section:
    """The section under another name: the comparison with AdaLoRA is the same table of other methods."""
    rows = {form: _rows(study, settings, results, form) for form in FORMS}
    measurements = [one for form in FORMS for one in _measurements(study, name, rows[form], form)]
    tables = [_table(study, rows[form], form, name, title, paper) for form in FORMS]
    drifts = _drifts(study, settings, results)
    texts = [_power(rows[form], form) for form in FORMS if len(rows[form]) > 1]
    if any(drifts.values()):
        tables.append(_drift_table(drifts, name))
        measurements += _drift_measurements(study, settings, drifts, name)
    tables.append(_trained(study, settings, results, name))
    figures = [_figure(rows["likelihood"], name)] if len(rows["likelihood"]) > 1 else []
    return Section(
        name, title, [text for text in texts if text], tables, figures, measurements, list(results.missing)
    )


@dataclass(frozen=True)
class Row:
    """A method's scores with their replicates: of each domain by its own adapter, their mean, and Retain."""

    title: str
    domains: dict[str, Draws]
    by_seed: dict[str, list[float]]
    items: dict[str, list[list[float]]]
    retain: Draws
    retain_by_seed: list[float]
    jobs: list[Job]

    @property
    def mean(self) -> Draws:
        """The mean over the domains."""
        return np.mean(list(self.domains.values()), axis=0)


def _runs(study: Study, settings: OfMethods) -> Iterator[tuple[str, str, int, Job]]:
    for method in settings.methods:
        for domain in study.recipe.domains:
            for seed in study.seeds(settings):
                yield method, domain, seed, study.score(study.adapter(study.row(method), domain, seed))


def _rows(study: Study, settings: OfMethods, results: Results, form: str) -> list[Row]:
    """The base first, then every method all of whose runs are there."""
    draws = Resampler()
    tasks = {domain: found.task for domain, found in study.recipe.domains.items()}
    base = {d: results.items(study.score(), task, form) for d, task in tasks.items()}
    if any(items is None for items in base.values()):
        return []
    known: dict[str, list[float]] = {domain: items or [] for domain, items in base.items()}
    reference = {domain: draws.mean(tasks[domain], items) for domain, items in known.items()}
    nothing = np.zeros(len(next(iter(reference.values()))))
    rows = [
        Row("Base model", reference, {}, {d: [i] for d, i in known.items()}, nothing, [], [study.score()])
    ]
    for method in settings.methods:
        # scores[trained on][scored on][seed]
        scores: dict[str, dict[str, list[list[float]]]] = {d: {e: [] for e in tasks} for d in tasks}
        used, whole = [], True
        for name, domain, _, job in _runs(study, settings):
            if name != method:
                continue
            for other, task in tasks.items():
                items = results.items(job, task, form)
                whole = whole and items is not None
                scores[domain][other].append(items or [])
            used.append(job)
        if whole:
            rows.append(_row(study.row(method).title, scores, known, tasks, draws, used))
    return rows


def _row(
    title: str,
    scores: dict[str, dict[str, list[list[float]]]],
    base: dict[str, list[float]],
    tasks: dict[str, str],
    draws: Resampler,
    used: list[Job],
) -> Row:
    own = {domain: scores[domain][domain] for domain in tasks}
    drops = [
        draws.mean(tasks[other], np.subtract(base[other], over_seeds(scores[domain][other])))
        for domain in tasks
        for other in tasks
        if other != domain
    ]
    count = len(next(iter(own.values())))
    retain_by_seed = [
        float(
            np.mean(
                [
                    np.mean(base[other]) - np.mean(scores[domain][other][seed])
                    for domain in tasks
                    for other in tasks
                    if other != domain
                ]
            )
        )
        for seed in range(count)
        if len(tasks) > 1
    ]
    return Row(
        title,
        {domain: draws.mean(tasks[domain], over_seeds(own[domain])) for domain in tasks},
        {domain: [float(np.mean(items)) for items in own[domain]] for domain in tasks},
        own,
        np.mean(drops, axis=0) if drops else np.zeros(len(draws.mean(tasks[next(iter(own))], [0.0]))),
        retain_by_seed,
        used,
    )


def _table(study: Study, rows: list[Row], form: str, name: str, title: str, paper: str) -> Table:
    domains = study.recipe.domains
    columns = ["Method", *(d.title for d in domains.values()), "Mean", "Retain"]
    lines = []
    for row in rows:
        cells = [
            cell(estimate(row.domains[d], row.by_seed.get(d, ())), _paper(paper, row.title, d, study, form))
            for d in domains
        ]
        cells.append(cell(estimate(row.mean)))
        is_base = row is rows[0]
        cells.append(
            NONE if is_base else cell(estimate(row.retain), _paper(paper, row.title, "Retain", study, form))
        )
        lines.append((row.title, cells))
    places = dict.fromkeys(range(len(domains) + 1), "high") | {len(domains) + 1: "low"}
    what = "Accuracy, pass rate or exact match" if form == "accuracy" else "Likelihood of the right answer"
    note = (
        f"{what}, in per cent: each domain by the adapter that was trained on it. Retain: mean drop on the other "
        "domains' tasks against the base model, in percentage points; lower is better, a gain counts as negative. "
        "Brackets: 95 % intervals over items, each with its mean over the seeds."
    )
    return Table(f"{name}-{form}", f"{title}: {form}", columns, marked(lines, places) if lines else [], note)


def _paper(table: str, method: str, column: str, study: Study, form: str) -> float | None:
    """The paper's value, beside scores of the form that it gives: accuracy."""
    if form != "accuracy":
        return None
    task = {"mmlu": "MMLU", "scienceqa": "ScienceQA", "gsm8k": "GSM8K"}
    if column in study.recipe.domains:
        given = study.recipe.domains[column].task
        column = "HumanEval" if given.startswith("humaneval") else task.get(given, given)
    return paper_value(table, method, column)


def _measurements(study: Study, name: str, rows: list[Row], form: str) -> Iterator[Measurement]:
    for row in rows:
        for domain, draws in row.domains.items():
            count = len(row.items[domain])
            wide = hierarchical({row.title: row.items[domain]})[row.title] if count > 1 else None
            found = estimate(draws, row.by_seed.get(domain, ()))
            more: dict[str, Any] = {"seeds": count, "items": len(row.items[domain][0]), "unit": "%"}
            yield measurement(
                name, row.title, "score", found, row.jobs, wide=wide, domain=domain, form=form, **more
            )
        if row is not rows[0]:
            found = estimate(row.retain, row.retain_by_seed)
            yield measurement(
                name,
                row.title,
                "retain",
                found,
                row.jobs,
                form=form,
                unit="pp",
                seeds=len(row.retain_by_seed),
            )
    for row in rows[2:]:
        against = rows[1]
        setting = {"minus": against.title}
        for metric, here, there in (
            ("retain difference", row.retain, against.retain),
            ("mean score difference", row.mean, against.mean),
        ):
            yield measurement(
                name,
                row.title,
                metric,
                estimate(here - there),
                [*row.jobs, *against.jobs],
                form=form,
                unit="pp",
                setting=setting,
                seeds=len(row.retain_by_seed),
            )


def _power(rows: list[Row], form: str) -> str:
    """The smallest differences between two methods that these items can tell."""
    if len(rows) < 3:
        return ""
    pairs = [(a, b) for i, a in enumerate(rows[1:]) for b in rows[i + 2 :]]
    retain = float(np.median([estimate(a.retain - b.retain).half or 0 for a, b in pairs]))
    mean = float(np.median([estimate(a.mean - b.mean).half or 0 for a, b in pairs]))
    return (
        f"By {form}, a difference between two methods can be told from none if it is larger than about {mean:.1f} pp "
        f"in the mean score and {retain:.1f} pp in Retain (median half width of the 95 % intervals of the paired "
        "differences)."
    )


def _drifts(study: Study, settings: OfMethods, results: Results) -> dict[str, dict[str, list[float]]]:
    """Method → text → KL of every run, in nats a token; methods all of whose runs are there."""
    found: dict[str, dict[str, list[float]]] = {}
    for method in settings.methods:
        values: dict[str, list[float]] = {}
        whole = True
        for name, _, _, job in _runs(study, settings):
            if name == method:
                result = results.get(job)
                whole = whole and result is not None
                for text, kl in drift(result).items() if result else ():
                    values.setdefault(text, []).append(kl)
        found[study.row(method).title] = values if whole else {}
    return found


def _drift_table(drifts: dict[str, dict[str, list[float]]], name: str) -> Table:
    texts = list(dict.fromkeys(text for values in drifts.values() for text in values))
    lines = [
        (
            method,
            [
                cell(Estimate(1000 * float(np.mean(values[t]))), digits=2) if t in values else NONE
                for t in texts
            ],
        )
        for method, values in drifts.items()
    ]
    note = (
        "KL divergence from the base model in thousandths of a nat a token, mean over domains and seeds; lower is "
        "better. The geometric means of the paired ratios stand among the measurements."
    )
    best = dict.fromkeys(range(len(texts)), "low")
    return Table(f"{name}-drift", "Drift from the base model", ["Method", *texts], marked(lines, best), note)


def _drift_measurements(
    study: Study, settings: OfMethods, drifts: dict[str, dict[str, list[float]]], name: str
) -> Iterator[Measurement]:
    titles = study.titles(settings.methods)
    jobs_of = {titles[m]: [j for n, _, _, j in _runs(study, settings) if n == m] for m in settings.methods}
    first = titles[settings.methods[0]]
    for method, values in drifts.items():
        for text, kl in values.items():
            found = Estimate(float(np.mean(kl)), sd=spread(kl))
            yield measurement(
                name,
                method,
                "drift",
                found,
                jobs_of[method],
                unit="nats/token",
                setting={"text": text},
                seeds=len(study.seeds(settings)),
            )
            others = drifts[first].get(text)
            if method != first and others:
                ratio = geometric([here / there for here, there in zip(kl, others, strict=True)])
                setting = {"text": text, "over": first}
                used = [*jobs_of[method], *jobs_of[first]]
                yield measurement(
                    name,
                    method,
                    "drift ratio",
                    ratio,
                    used,
                    setting=setting,
                    seeds=len(study.seeds(settings)),
                )


def _trained(study: Study, settings: OfMethods, results: Results, name: str) -> Table:
    """What each method trained: parameters against the first method's, rate, held-out loss."""
    seed, lines, first = study.seeds(settings)[0], [], None
    for method in settings.methods:
        row = study.row(method)
        runs = [study.adapter(row, d, s) for d in study.recipe.domains for s in study.seeds(settings)]
        found = [result for job in runs if (result := results.get(job)) is not None]
        choice = study.rate(row)
        rate = results.get(choice) if choice is not None else None
        told = _rate_told(row.lr, rate, study)
        if not found:
            lines.append((row.title, [NONE, NONE, Cell(text=told), NONE, NONE]))
            continue
        count = found[0]["trainable_parameters"]
        first = first or count
        losses = [
            (one["held_out_before"], one["held_out_after"])
            for one in found
            if one["held_out_after"] is not None
        ]
        before, after = (np.mean(values) for values in zip(*losses, strict=True)) if losses else (None, None)
        lines.append(
            (
                row.title,
                [
                    Cell(text=f"{count:,}"),
                    Cell(100 * (count / first - 1), digits=1),
                    Cell(text=told),
                    Cell(None if before is None else float(before), digits=3),
                    Cell(None if after is None else float(after), digits=3),
                ],
            )
        )
    columns = [
        "Method",
        "Trainable parameters",
        "Mismatch, %",
        "Learning rate",
        "Held-out loss before",
        "After",
    ]
    note = (
        f"Mismatch against the first method. Losses: mean over domains and seeds (first seed {seed}), nats a learned "
        "token, on rows that were held back."
    )
    return Table(f"{name}-training", "What was trained", columns, lines, note)


def _rate_told(given: Any, chosen: dict[str, Any] | None, study: Study) -> str:
    if isinstance(given, float):
        return f"{given:g}, given"
    if study.recipe.rates is None:
        return f"{study.recipe.train.lr:g}"
    if chosen is None:
        return ""
    return f"{chosen['value']:g}" + (", at the edge of the grid" if chosen["at_the_edge"] else "")


def _figure(rows: list[Row], name: str) -> Plot:
    series = [
        Series(
            row.title,
            [float(row.mean[0])],
            [float(row.retain[0])],
            low=[estimate(row.retain).low or 0.0],
            high=[estimate(row.retain).high or 0.0],
            x_low=[estimate(row.mean).low or 0.0],
            x_high=[estimate(row.mean).high or 0.0],
        )
        for row in rows[1:]
    ]
    return Plot(
        f"{name}-retain",
        "What was learned, and what it cost elsewhere",
        "mean likelihood of the right answer, own domain (%)",
        "Retain (pp, lower is better)",
        series,
        kind="points",
    )
