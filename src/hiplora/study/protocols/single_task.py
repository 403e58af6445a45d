"""Each method trained on each domain alone and scored on all of them: Table 1 of the paper, with Retain (Eq. 11)."""

from typing import Any

from hiplora.recipes.protocols import OfMethods
from hiplora.recipes.study import StudyMethod
from hiplora.reporting.study.paper import paper_value
from hiplora.reporting.study.spec import Cell, Measurement, Plot, Section, Series, Table
from hiplora.study.builder import Study
from hiplora.study.engine.jobs import Job
from hiplora.study.protocols.drifts import drift_measurements, drift_table, drifts
from hiplora.study.protocols.rows import (
    Row,
    base_row,
    held_out,
    method_row,
    row_differences,
    row_measurements,
    score_runs,
)
from hiplora.study.protocols.show import NONE, cell, form_told, marked, paper_column, smallest
from hiplora.study.results import FORMS, Results
from hiplora.study.statistics import Resampler, estimate

NAME, TITLE, PAPER = "single-task", "Single tasks", "single-task"


def jobs(study: Study, settings: OfMethods) -> list[Job]:
    """Score the base, and the adapter of every method, domain and seed."""
    return [study.score(), *(job for found in _runs(study, settings).values() for job in found)]


def section(study: Study, settings: OfMethods, results: Results) -> Section:
    """Tables of the domains' scores and Retain in both forms, of the drift, and of what was trained."""
    return single_task_section(study, settings, results, NAME, TITLE, PAPER)


def single_task_section(
    study: Study, settings: OfMethods, results: Results, name: str, title: str, paper: str
) -> Section:
    """The section under another name: the comparison with AdaLoRA is the same table of other methods."""
    rows = {form: _rows(study, settings, results, form) for form in FORMS}
    measurements: list[Measurement] = []
    tables: list[Table] = []
    for form, found in rows.items():
        tables.append(_table(study, found, form, name, title, paper))
        for row in found:
            measurements += row_measurements(name, row, form, is_base=row is found[0])
        measurements += row_differences(name, found[1:], form)
    runs = _runs(study, settings)
    moved = drifts(runs, results)
    if any(moved.values()):
        over = "domains and seeds"
        tables.append(drift_table(moved, f"{name}-drift", "Drift from the base model", over))
        measurements += drift_measurements(moved, runs, name, len(study.seeds(settings)))
    tables.append(_trained(study, settings, results, name))
    texts = [text for form in FORMS if (text := _power(rows[form], form))]
    figures = [_figure(rows["likelihood"], name)] if len(rows["likelihood"]) > 1 else []
    return Section(name, title, texts, tables, figures, measurements, list(results.missing))


def _runs(study: Study, settings: OfMethods) -> dict[str, list[Job]]:
    """Title → the scores of a method's adapters, of all domains, seed after seed."""
    seeds = study.seeds(settings)
    return {
        study.row(method).title: [
            job
            for of_seed in zip(*score_runs(study, study.row(method), seeds).values(), strict=True)
            for job in of_seed
        ]
        for method in settings.methods
    }


def _rows(study: Study, settings: OfMethods, results: Results, form: str) -> list[Row]:
    """The base first, then every method all of whose runs are there."""
    draws = Resampler()
    if (base := base_row(study, results, form, draws)) is None:
        return []
    rows: list[Row] = [base]
    for method in settings.methods:
        row = study.row(method)
        runs = score_runs(study, row, study.seeds(settings))
        found = method_row(study, row.title, runs, results, form, draws)
        rows += [found] if found is not None else []
    return rows


def _table(study: Study, rows: list[Row], form: str, name: str, title: str, paper: str) -> Table:
    domains = study.recipe.domains
    columns = ["Method", *(d.title for d in domains.values()), "Mean", "Retain"]
    lines = []
    for row in rows:
        cells = [
            cell(estimate(row.domains[d], row.by_seed.get(d, ())), _paper(paper, row.title, d, study, form))
            for d in domains
        ]
        cells.append(cell(estimate(row.mean, row.mean_by_seed)))
        is_base = row is rows[0]
        cells.append(
            NONE
            if is_base
            else cell(
                estimate(row.retain, row.retain_by_seed), _paper(paper, row.title, "Retain", study, form)
            )
        )
        lines.append((row.title, cells))
    places = dict.fromkeys(range(len(domains) + 1), "high") | {len(domains) + 1: "low"}
    note = (
        f"{form_told(form)}: each domain by the adapter that was trained on it. Retain: mean drop on the other "
        "domains' tasks against the base model, in percentage points; lower is better, a gain counts as negative. "
        "±: standard deviation over seeds. Brackets: 95 % intervals over items, each with its mean over the seeds."
    )
    return Table(f"{name}-{form}", f"{title}: {form}", columns, marked(lines, places) if lines else [], note)


def _paper(table: str, method: str, column: str, study: Study, form: str) -> float | None:
    """The paper's value, beside scores of the form that it gives: accuracy."""
    if form != "accuracy":
        return None
    if column in study.recipe.domains:
        column = paper_column(study.recipe.domains[column].task)
    return paper_value(table, method, column)


def _power(rows: list[Row], form: str) -> str:
    """The smallest differences between two methods that these items can tell."""
    mean, retain = smallest([row.mean for row in rows[1:]]), smallest([row.retain for row in rows[1:]])
    if mean is None or retain is None:
        return ""
    return (
        f"By {form}, a difference between two methods can be told from none if it is larger than about {mean:.1f} pp "
        f"in the mean score and {retain:.1f} pp in Retain (median half width of the 95 % intervals of the paired "
        "differences)."
    )


def _trained(study: Study, settings: OfMethods, results: Results, name: str) -> Table:
    """What each method trained: parameters against the first method's, rate, held-out loss."""
    lines, first = [], None
    for method in settings.methods:
        row = study.row(method)
        runs = [study.adapter(row, d, s) for d in study.recipe.domains for s in study.seeds(settings)]
        found = [result for job in runs if (result := results.get(job)) is not None]
        choice = study.rate(row)
        rate = results.get(choice) if choice is not None else None
        told = _rate_told(row, rate, study)
        if not found:
            lines.append((row.title, [NONE, NONE, Cell(text=told), NONE, NONE]))
            continue
        count = found[0]["trainable_parameters"]
        first = first or count
        losses = held_out(found) if len(found) == len(runs) else (None, None)  # of some runs: another mean
        lines.append(
            (
                row.title,
                [
                    Cell(text=f"{count:,}"),
                    Cell(100 * (count / first - 1), digits=1),
                    Cell(text=told),
                    *(Cell(loss, digits=3) for loss in losses),
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
        "Mismatch against the first method. Losses: mean over domains and seeds, nats a learned token, on rows that "
        "were held back."
    )
    return Table(f"{name}-training", "What was trained", columns, lines, note)


def _rate_told(row: StudyMethod, chosen: dict[str, Any] | None, study: Study) -> str:
    if isinstance(row.lr, float):
        return f"{row.lr:g}, given"
    if study.recipe.rates is None:
        return f"{study.recipe.given_rate(row):g}"
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
