"""One adapter trained on one domain after the other: the whole matrix of scores, AvgAcc and Forgetting (C.4)."""

from collections.abc import Iterator, Sequence

from hiplora.recipes.protocols import Continual
from hiplora.reporting.study.paper import paper_value
from hiplora.reporting.study.spec import Figure, Grid, Matrix, Measurement, Section, Table
from hiplora.study.builder import Study
from hiplora.study.engine.jobs import Job
from hiplora.study.protocols.continual_runs import (
    METRICS,
    Learner,
    Scores,
    base_scores,
    learners_of,
    order_of,
    stages_of,
    tasks_of,
    titles_of,
)
from hiplora.study.protocols.drifts import drift_measurements, drift_table, drifts
from hiplora.study.protocols.show import (
    NONE,
    cell,
    difference,
    form_told,
    marked,
    measurement,
    paper_column,
    smallest_told,
)
from hiplora.study.results import FORMS, Results
from hiplora.study.statistics import Resampler, estimate, ratio

NAME, TITLE, BASE = "continual", "Continual tuning", "Base model"


def jobs(study: Study, settings: Continual) -> list[Job]:
    """Score the base, and every stage of every method and seed on the tasks of all domains."""
    stages = [
        job for method in settings.methods for jobs in stages_of(study, settings, method) for job in jobs
    ]
    return [study.score(), *stages]


def section(study: Study, settings: Continual, results: Results) -> Section:
    """Tables of the paper's two numbers in both forms, every task after every stage, the drift after the last stage."""
    draws = Resampler()
    tables: list[Table] = []
    figures: list[Figure] = []
    measurements: list[Measurement] = []
    texts: list[str] = []
    for form in FORMS:
        base = base_scores(study, settings, results, form, draws)
        found = learners_of(study, settings, results, form, draws)
        tables += [_table(base, found, form), _stage_table(study, settings, base, found, form)]
        measurements += _measurements(study, settings, base, found, form)
        figures += [_matrices(study, settings, base, found, form)] if found else []
        texts += _texts(base, found, form)
    runs = {
        study.row(method).title: [stages[-1] for stages in stages_of(study, settings, method)]
        for method in settings.methods
    }
    moved = drifts(runs, results)
    if any(moved.values()):
        tables.append(drift_table(moved, f"{NAME}-drift", "Drift after all stages", "seeds"))
        measurements += drift_measurements(moved, runs, NAME, len(study.seeds(settings)))
    return Section(NAME, TITLE, texts, tables, figures, measurements, list(results.missing))


def _table(base: Scores | None, learners: Sequence[Learner], form: str) -> Table:
    rows = []
    for one in learners:
        cells = []
        for name, (column, _) in METRICS.items():
            paper = (
                paper_value("continual", one.title, column)
                if form == "accuracy" and column in ("AvgAcc", "Forgetting")
                else None
            )
            cells.append(cell(estimate(one.metric(name), one.seeds(name)), paper))
        rows.append((one.title, cells))
    rows = marked(rows, {place: prefer for place, (_, prefer) in enumerate(METRICS.values())})
    if base is not None:
        rows.insert(0, (BASE, [cell(estimate(base.mean(axis=0))), *[NONE] * (len(METRICS) - 1)]))
    columns = ["Method", *(column for column, _ in METRICS.values())]
    note = (
        f"{form_told(form)}. AvgAcc: mean over the tasks after the last stage; Forgetting: mean fall from the best "
        "earlier stage, lower is better; backward transfer: mean change since a task's own stage; ±: standard "
        "deviation over seeds; brackets: 95 % intervals over items, each with its mean over the seeds."
    )
    return Table(f"{NAME}-{form}", f"{TITLE}: {form}", columns, rows, note)


def _stage_table(
    study: Study,
    settings: Continual,
    base: Scores | None,
    learners: Sequence[Learner],
    form: str,
) -> Table:
    """Every task after every stage with its interval: Table 9."""
    titles = titles_of(study, settings)
    papers = [paper_column(task) for task in tasks_of(study, settings)]
    rows = [] if base is None else [(BASE, [cell(estimate(draws)) for draws in base])]
    for one in learners:
        for title, scores in zip(titles, one.matrix, strict=True):
            name = f"{one.title}, after {title}"
            given = [paper_value("continual-matrix", name, column) for column in papers]
            shown = given if form == "accuracy" else [None] * len(given)
            rows.append((name, [cell(estimate(d), paper) for d, paper in zip(scores, shown, strict=True)]))
    note = (
        f"{form_told(form)}, mean over the seeds; the stages in order. Brackets: 95 % intervals over items."
    )
    title = f"Every task after every stage: {form}"
    return Table(f"{NAME}-stages-{form}", title, ["After", *titles], rows, note)


def _measurements(
    study: Study,
    settings: Continual,
    base: Scores | None,
    learners: Sequence[Learner],
    form: str,
) -> Iterator[Measurement]:
    if base is not None:
        yield measurement(
            NAME, BASE, "average accuracy", estimate(base.mean(axis=0)), [study.score()], form=form, unit="%"
        )
        for domain, draws in zip(order_of(study, settings), base, strict=True):
            yield measurement(
                NAME, BASE, "score", estimate(draws), [study.score()], domain=domain, form=form, unit="%",
                setting={"stage": 0},
            )  # fmt: skip
    for place, one in enumerate(learners):
        seeds = len(one.by_seed)
        for name in METRICS:
            unit = "%" if "accuracy" in name else "pp"
            found = estimate(one.metric(name), one.seeds(name))
            yield measurement(NAME, one.title, name, found, one.jobs, form=form, unit=unit, seeds=seeds)
        yield from _scores(study, settings, one, form)
        for against in learners[:place]:
            for name in METRICS:
                sides = (
                    (one.title, one.metric(name), one.jobs),
                    (against.title, against.metric(name), against.jobs),
                )
                by_seed = one.seeds(name), against.seeds(name)
                yield difference(NAME, name, *sides, by_seed=by_seed, form=form, seeds=seeds)
            yield _ratio(one, against, form)


def _scores(study: Study, settings: Continual, one: Learner, form: str) -> Iterator[Measurement]:
    """Every cell of the matrix; stages and tasks count from 1."""
    for stage, row in enumerate(one.matrix):
        for task, (domain, draws) in enumerate(zip(order_of(study, settings), row, strict=True)):
            yield measurement(
                NAME, one.title, "score", estimate(draws, one.by_seed[:, stage, task, 0].tolist()), one.stages[stage],
                domain=domain, form=form, unit="%", seeds=len(one.by_seed),
                setting={"stage": stage + 1, "task": task + 1},
            )  # fmt: skip


def _ratio(one: Learner, against: Learner, form: str) -> Measurement:
    """Forgetting over another method's; where that may forget nothing, its interval may be open."""
    found = ratio(one.metric("forgetting"), against.metric("forgetting"))
    return measurement(
        NAME, one.title, "forgetting ratio", found, [*one.jobs, *against.jobs], form=form, unit="ratio",
        setting={"over": against.title}, seeds=len(one.by_seed),
    )  # fmt: skip


def _matrices(
    study: Study,
    settings: Continual,
    base: Scores | None,
    learners: Sequence[Learner],
    form: str,
) -> Figure:
    titles = titles_of(study, settings)
    names = [*(["base"] if base is not None else []), *(f"after {title}" for title in titles)]
    before = [] if base is None else [base[:, 0].tolist()]
    parts = [
        Matrix(
            f"{NAME}-matrix-{form}-{place}",
            one.title,
            names,
            titles,
            [*before, *one.matrix[:, :, 0].tolist()],
            "%",
        )
        for place, one in enumerate(learners)
    ]
    note = f"{form_told(form)}, mean over the seeds: a row a stage, a column a task."
    return Grid(f"{NAME}-matrix-{form}", f"Every task after every stage: {form}", parts, note)


def _texts(base: Scores | None, learners: Sequence[Learner], form: str) -> Iterator[str]:
    if not learners:
        return
    kept = ", ".join(f"{one.title} {one.metric('average accuracy')[0]:.1f}" for one in learners)
    lost = ", ".join(f"{one.title} {one.metric('forgetting')[0]:.1f}" for one in learners)
    start = "" if base is None else f" (the base: {base[:, 0].mean():.1f})"
    told = f"By {form}, the mean score after the last stage, in per cent: {kept}{start}. Forgetting, in pp: {lost}."
    least = smallest_told([one.metric("forgetting") for one in learners])
    yield f"{told} {least}".strip()
