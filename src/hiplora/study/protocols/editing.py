"""Facts edited by each method: whether the edits took, in other words too, and what became of everything else (C.4)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hiplora.recipes.protocols import Editing
from hiplora.reporting.study.paper import paper_value
from hiplora.reporting.study.spec import Cell, Figure, Measurement, Plot, Section, Series, Table
from hiplora.study.builder import Study, as_written
from hiplora.study.engine.jobs import Job
from hiplora.study.protocols.show import NONE, cell, difference, marked, measurement, smallest
from hiplora.study.results import Results, drift
from hiplora.study.statistics import Draws, Estimate, Resampler, estimate, geometric, over_seeds, ratio

NAME, TITLE, ALPHAEDIT = "editing", "Knowledge editing", "alphaedit"
OF_THE_EDITS = {  # metric → column of the edits' records
    "edit success": "success",
    "preferred": "preferred",
    "match": "exact",
    "paraphrase success": "paraphrase_success",
}
SHOWN = {
    "edit success": ("Edit success", "high"),
    "preferred": ("log p(new) > log p(old)", "high"),
    "match": ("Match", "high"),
    "paraphrase success": ("Paraphrase", "high"),
    "neighbours kept": ("Neighbours kept", "high"),
    "locality": ("Locality: accuracy lost", "low"),
    "locality damage": ("Answers changed", "low"),
    "log-probability change": ("Log p of unrelated answers", "high"),
    "edited log-probability change": ("Log p of edited targets", "high"),
}
NATS = ("log-probability change", "edited log-probability change")


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
    """A table a set and mode, one by categories, the course of a sequence, and the drift after the last edit."""
    draws = Resampler()
    tables: list[Table] = []
    figures: list[Figure] = []
    measurements: list[Measurement] = []
    texts: list[str] = []
    for name in settings.sets:
        for mode in settings.modes:
            found = [
                one
                for method in _methods(settings)
                if (one := _edited(study, settings, results, draws, name, mode, method)) is not None
            ]
            tables.append(_table(settings, name, mode, found))
            if found:
                tables.append(_categories(settings, name, mode, found, draws))
                texts += _texts(settings, name, mode, found)
                measurements += _measurements(name, mode, found)
            if mode == "sequential" and found:
                figures.append(_course(settings, name, found))
    return Section(NAME, TITLE, texts, tables, figures, measurements, list(results.missing))


@dataclass(frozen=True)
class Edited:
    """A method's run: metric → value with replicates, its columns item by item, success after each stage, drift."""

    title: str
    metrics: dict[str, Draws]
    categories: dict[str, dict[str, list[float]]]  # category → metric → items
    course: list[tuple[int, float, float]]  # edits so far, success of all, share of unrelated answers changed
    drifts: list[dict[str, float]]
    jobs: list[Job]
    edits: int
    questions: int


def _methods(settings: Editing) -> list[str]:
    return [*settings.methods, *([ALPHAEDIT] if settings.alphaedit is not None else [])]


def _runs(study: Study, settings: Editing, name: str, mode: str, method: str) -> list[Job]:
    """The jobs of a method, one a seed. AlphaEdit trains nothing: its rate and steps are its own."""
    facts, trains = settings.sets[name], method != ALPHAEDIT
    given = (
        as_written(study.row(method).method) if trains else {"name": ALPHAEDIT, **(settings.alphaedit or {})}
    )
    title = study.row(method).title if trains else "AlphaEdit"
    steps = settings.single_steps if mode == "single" else settings.steps
    evaluation = study.recipe.evaluation.drift
    texts = None if evaluation is None or mode == "single" else evaluation.settings()
    files = [None if facts.edits == "builtin" else facts.edits, given.get("calibration_text")]
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
            "lr": settings.lr.get(method, study.recipe.train.lr) if trains else None,
            "rows": settings.rows if trains else None,
            "questions": settings.questions,
            "drift": texts,
            "seed": seed,
            "files": study.hashes(files),
        }
        found.append(study.job("edit", f"edit {name} by {title}, {mode}, seed {seed}", asked, **needs))
    return found


def _edited(
    study: Study, settings: Editing, results: Results, draws: Resampler, name: str, mode: str, method: str
) -> Edited | None:
    runs = _runs(study, settings, name, mode, method)
    given = [results.get(job) for job in runs]
    found = [one for one in given if one is not None]
    if len(found) < len(given):
        return None
    columns = [_columns(one) for one in found]
    metrics = {
        metric: draws.mean(f"{name} edits", over_seeds([_percent(one[column]) for one in columns]))
        for metric, column in OF_THE_EDITS.items()
    }
    kept = [one["neighbours_kept"] for one in columns]
    if all(one is not None for one in kept):
        near = [[100 * float(np.mean(edit)) for edit in one if edit] for one in kept]
        metrics["neighbours kept"] = draws.mean(f"{name} neighbours", over_seeds(near))
    questions = [one["questions"] for one in found if one["questions"]]
    if len(questions) == len(found):
        for metric, values in _locality(questions).items():
            metrics[metric] = draws.mean("questions", values)
    return Edited(
        study.row(method).title if method != ALPHAEDIT else "AlphaEdit",
        metrics,
        _by_category(columns),
        _course_of(found[0]),
        [drift(one) for one in found if one["drift"]],
        runs,
        len(columns[0]["success"]),
        len(questions[0]["correct"]) if questions else 0,
    )


def _columns(found: Mapping[str, Any]) -> dict[str, Any]:
    """The records of all edits that count: after the last stage of a sequence, else of every stage."""
    stages = [stage["records"] for stage in found["stages"]]
    if found["mode"] == "sequential":
        return stages[-1]
    joined: dict[str, Any] = {}
    for column in stages[0]:
        parts = [stage[column] for stage in stages]
        joined[column] = (
            None if any(part is None for part in parts) else [value for part in parts for value in part]
        )
    return joined


def _locality(questions: Sequence[Mapping[str, list[float]]]) -> dict[str, list[float]]:
    """The metrics of the unrelated questions, item by item: in pp and %, and in nats."""

    def change(after: str, before: str, scale: float) -> list[float]:
        return over_seeds([(scale * np.subtract(one[after], one[before])).tolist() for one in questions])

    return {
        "locality": change("correct_before", "correct", 100.0),
        "locality damage": over_seeds(
            [(100 * (1 - np.asarray(one["unchanged"]))).tolist() for one in questions]
        ),
        "log-probability change": change("log_prob", "log_prob_before", 1.0),
        "edited log-probability change": change("edited_log_prob", "edited_log_prob_before", 1.0),
    }


def _by_category(columns: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {}
    for metric in ("edit success", "paraphrase success"):
        values = over_seeds([_percent(one[OF_THE_EDITS[metric]]) for one in columns])
        for category, value in zip(columns[0]["category"], values, strict=True):
            found.setdefault(str(category), {}).setdefault(metric, []).append(value)
    return found


def _course_of(found: Mapping[str, Any]) -> list[tuple[int, float, float]]:
    if found["mode"] != "sequential":
        return []
    course = []
    for stage in found["stages"]:
        success = stage["records"]["success"]
        local = stage["locality"] or {}
        course.append(
            (len(success), 100 * float(np.mean(success)), float(local.get("accuracy_change") or 0.0))
        )
    return course


def _percent(values: Sequence[float]) -> list[float]:
    return [100 * float(value) for value in values]


def _label(settings: Editing, name: str) -> str:
    return settings.sets[name].title or name


def _table(settings: Editing, name: str, mode: str, found: Sequence[Edited]) -> Table:
    metrics = [metric for metric in SHOWN if any(metric in one.metrics for one in found)] or list(SHOWN)[:4]
    texts = list(dict.fromkeys(text for one in found for kl in one.drifts for text in kl))
    rows: list[tuple[str, list[Cell]]] = []
    for one in found:
        cells = [_cell(one, metric, mode) for metric in metrics]
        for text in texts:
            kl = [found[text] for found in one.drifts if text in found]
            cells.append(Cell(1000 * float(np.mean(kl)), digits=2) if kl else NONE)
        rows.append((one.title, cells))
    columns = ["Method", *(SHOWN[metric][0] for metric in metrics), *(f"Drift, {text}" for text in texts)]
    best = {place: SHOWN[metric][1] for place, metric in enumerate(metrics)}
    best |= dict.fromkeys(range(len(metrics), len(metrics) + len(texts)), "low")
    counts = f"{found[0].edits:,} edits, {found[0].questions:,} unrelated questions. " if found else ""
    note = (
        f"{counts}Shares in per cent, with 95 % intervals over edits and questions. Edit success: the answer matches "
        "or is likelier than the old one. Locality: accuracy before − after on the unrelated questions, in pp; answers "
        "changed: of all of them, in per cent; log p: mean change in nats. Drift: KL from the base in thousandths of "
        "a nat a token."
    )
    return Table(
        f"{NAME}-{name}-{mode}", f"{_label(settings, name)}, {mode}", columns, marked(rows, best), note
    )


def _cell(one: Edited, metric: str, mode: str) -> Cell:
    if metric not in one.metrics:
        return NONE
    column = {"edit success": "Edit success", "locality": "Locality"}.get(metric)
    paper = paper_value("editing", one.title, column) if column and mode == "batch" else None
    return cell(estimate(one.metrics[metric]), paper, 2 if metric in NATS else 1)


def _categories(settings: Editing, name: str, mode: str, found: Sequence[Edited], draws: Resampler) -> Table:
    categories = list(dict.fromkeys(category for one in found for category in one.categories))
    metrics = ("edit success", "paraphrase success")
    rows = []
    for one in found:
        cells = []
        for category in categories:
            for metric in metrics:
                items = one.categories.get(category, {}).get(metric)
                cells.append(
                    cell(estimate(draws.mean(f"{name} {category}", items)) if items else None, digits=1)
                )
        rows.append((one.title, cells))
    columns = [
        "Method",
        *(f"{category}, {metric.split()[0]}" for category in categories for metric in metrics),
    ]
    best = dict.fromkeys(range(len(columns) - 1), "high")
    counts = ", ".join(
        f"{category}: {len(found[0].categories[category][metrics[0]])}"
        for category in categories
        if category in found[0].categories
    )
    title = f"{_label(settings, name)}, {mode}: by category"
    return Table(
        f"{NAME}-{name}-{mode}-categories",
        title,
        columns,
        marked(rows, best),
        f"Edits by category: {counts}.",
    )


def _measurements(name: str, mode: str, found: Sequence[Edited]) -> Iterator[Measurement]:
    setting = {"set": name, "mode": mode}
    for place, one in enumerate(found):
        counts: dict[str, Any] = {"setting": setting, "seeds": len(one.jobs)}
        for metric, value in one.metrics.items():
            unit = "nats" if metric in NATS else "pp" if metric == "locality" else "%"
            items = one.questions if metric.startswith(("loc", "log", "edited")) else one.edits
            yield measurement(
                NAME, one.title, metric, estimate(value), one.jobs, unit=unit, items=items, **counts
            )
        for text in one.drifts[0] if one.drifts else ():
            kl = [found_[text] for found_ in one.drifts]
            told = {**counts, "setting": {**setting, "text": text}}
            yield measurement(
                NAME, one.title, "drift", Estimate(float(np.mean(kl))), one.jobs, unit="nats/token", **told
            )
        for against in found[:place]:
            for metric in one.metrics:
                if metric in against.metrics and metric not in NATS:
                    sides = (
                        (one.title, one.metrics[metric], one.jobs),
                        (against.title, against.metrics[metric], against.jobs),
                    )
                    yield difference(NAME, metric, *sides, **counts)
            yield from _ratios(one, against, counts)


def _ratios(one: Edited, against: Edited, counts: Mapping[str, Any]) -> Iterator[Measurement]:
    """Damage over another method's, of the changed answers and of the drift; where that one may do none, a ratio has no
    interval.
    """
    setting = {**counts["setting"], "over": against.title}
    used, seeds = [*one.jobs, *against.jobs], counts["seeds"]
    here, there = one.metrics.get("locality damage"), against.metrics.get("locality damage")
    if here is not None and there is not None:
        found = ratio(here, there)
        yield measurement(
            NAME,
            one.title,
            "locality damage ratio",
            found,
            used,
            unit="ratio",
            setting=setting,
            seeds=seeds,
        )
    for text in one.drifts[0] if one.drifts and against.drifts else ():
        apart = geometric(
            [a[text] / b[text] for a, b in zip(one.drifts, against.drifts, strict=True) if b[text] > 0]
        )
        told = {**setting, "text": text}
        yield measurement(
            NAME, one.title, "drift ratio", apart, used, unit="ratio", setting=told, seeds=seeds
        )


def _texts(settings: Editing, name: str, mode: str, found: Sequence[Edited]) -> Iterator[str]:
    if len(found) < 2:
        return
    least = smallest([one.metrics["edit success"] for one in found])
    told = ", ".join(f"{one.title} {one.metrics['edit success'][0]:.1f} %" for one in found)
    yield (
        f"{_label(settings, name)}, {mode}: edit success {told}; a difference between two methods can be told from "
        f"none if it is larger than about {least:.1f} pp."
    )


def _course(settings: Editing, name: str, found: Sequence[Edited]) -> Plot:
    series = [
        Series(one.title, [float(count) for count, _, _ in one.course], [value for _, value, _ in one.course])
        for one in found
    ]
    return Plot(
        f"{NAME}-{name}-sequence",
        f"{_label(settings, name)}: edits that still work, batch after batch",
        "edits so far",
        "edit success (%)",
        series,
    )
