"""Facts edited by each method: whether the edits took, in other words too, and what became of everything else (C.4)."""

from hiplora.recipes.protocols import ALPHAEDIT, Editing
from hiplora.reporting.study.spec import Figure, Measurement, Section, Table
from hiplora.study.builder import Study, as_written
from hiplora.study.engine.jobs import Job
from hiplora.study.protocols.drifts import drift_measurements, drifts
from hiplora.study.protocols.editing_runs import Edited, edited
from hiplora.study.protocols.editing_tables import (
    BUILT_IN,
    NAME,
    categories_table,
    course_plot,
    edits_measurements,
    edits_table,
    edits_text,
)
from hiplora.study.results import Results
from hiplora.study.statistics import Resampler

TITLE = "Knowledge editing"


def jobs(study: Study, settings: Editing) -> list[Job]:
    """Edit every set in every mode by every method, AlphaEdit among them if asked for."""
    return [
        job
        for name in settings.sets
        for mode in settings.modes
        for method in _methods(settings)
        for job in _runs(study, settings, name, mode, method)
    ]


def section(study: Study, settings: Editing, results: Results) -> Section:
    """A table a set and mode with the drift after the last edit, one by categories, and the course of a sequence."""
    draws = Resampler()
    tables: list[Table] = []
    figures: list[Figure] = []
    measurements: list[Measurement] = []
    texts: list[str] = []
    for name in settings.sets:
        for mode in settings.modes:
            runs = {
                _title(study, method): _runs(study, settings, name, mode, method)
                for method in _methods(settings)
            }
            found = _found(runs, name, results, draws)
            moved = drifts(runs, results)
            tables.append(edits_table(settings, name, mode, found, moved, _rates(study, settings)))
            if found:
                tables.append(categories_table(settings, name, mode, found))
                texts.append(edits_text(settings, name, mode, found))
                measurements += edits_measurements(name, mode, found)
                seeds = len(study.seeds(settings))
                measurements += drift_measurements(moved, runs, NAME, seeds, set=name, mode=mode)
            if mode == "sequential" and found:
                figures.append(course_plot(settings, name, found))
    return Section(NAME, TITLE, texts, tables, figures, measurements, list(results.missing))


def _found(runs: dict[str, list[Job]], name: str, results: Results, draws: Resampler) -> list[Edited]:
    """The methods all of whose runs are there."""
    found = []
    for title, jobs in runs.items():
        given = [results.get(job) for job in jobs]
        done = [one for one in given if one is not None]
        if len(done) == len(given):
            found.append(edited(title, name, done, jobs, draws))
    return found


def _title(study: Study, method: str) -> str:
    return study.row(method).title if method != ALPHAEDIT else "AlphaEdit"


def _rate(study: Study, settings: Editing, method: str) -> float:
    """A method's learning rate on edits. One that was chosen on a task's rows, or given for them, is not taken over:
    a handful of edits is not what it was chosen for.
    """
    return settings.lr.get(method, study.recipe.train.lr)


def _rates(study: Study, settings: Editing) -> str:
    rates = ", ".join(
        f"{study.row(method).title} {_rate(study, settings, method):g}" for method in settings.methods
    )
    return f"Learning rates on edits: {rates}."


def _methods(settings: Editing) -> list[str]:
    return [*settings.methods, *([ALPHAEDIT] if settings.alphaedit is not None else [])]


def _runs(study: Study, settings: Editing, name: str, mode: str, method: str) -> list[Job]:
    """The jobs of a method, one a seed. AlphaEdit trains nothing: its rate and steps are its own."""
    facts, trains = settings.sets[name], method != ALPHAEDIT
    given = (
        as_written(study.row(method).method) if trains else {"name": ALPHAEDIT, **(settings.alphaedit or {})}
    )
    title = _title(study, method)
    steps = settings.single_steps if mode == "single" else settings.steps
    evaluation = study.recipe.evaluation.drift
    texts = None if evaluation is None or mode == "single" else evaluation.settings()
    files = [None if facts.edits == BUILT_IN else facts.edits, given.get("calibration_text")]
    if texts is not None:
        files += [source.partition(":")[0] for source in texts["texts"].values()]
    needs = {}
    if trains and (factors := study.factors(study.row(method))) is not None:
        needs["factors"] = factors
    found = []
    for seed in study.seeds(settings):
        asked = {
            "method": given,
            "edits": facts.edits,
            "limit": facts.limit,
            "neighbours": facts.neighbours,
            "mode": mode,
            "edits_per_batch": None if mode == "single" else settings.edits_per_batch,
            "sample": settings.sample if mode == "single" else None,
            "steps": steps if trains else None,
            "lr": _rate(study, settings, method) if trains else None,
            "rows": settings.rows if trains else None,
            "questions": settings.questions,
            "drift": texts,
            "seed": seed,
            "files": study.hashes(files),
        }
        if facts.category is not None:
            asked["category"] = facts.category
        found.append(study.job("edit", f"edit {name} by {title}, {mode}, seed {seed}", asked, **needs))
    return found
