"""PEFT's own comparison of methods: trained on MetaMathQA, tested on GSM8K, accuracy against forgetting.

Forgetting is the mean loss of the next token on texts of an encyclopedia after training minus that of the bare base, in
nats. Source: github.com/huggingface/peft, method_comparison/MetaMathQA, as its pull request 3419 left the measure. How
far this study and that benchmark agree stands in the recipe `peft-metamath`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from hiplora.recipes.protocols import BenchmarkPoint, MetaMath
from hiplora.reporting.study.spec import Cell, Measurement, Plot, Section, Series, Table
from hiplora.study.builder import Study
from hiplora.study.engine.jobs import Job
from hiplora.study.protocols.metamath_json import result_file
from hiplora.study.protocols.metamath_rows import Row, all_rows, all_runs, base_job
from hiplora.study.protocols.show import NONE, cell, marked, measurement
from hiplora.study.results import FORMS, Results
from hiplora.study.statistics import Estimate, estimate, hierarchical, spread

NAME, TITLE = "metamath", "PEFT's comparison of methods"
THEIRS = "PEFT's benchmark, not measured here"
COLUMNS = (
    *("Method", "Test accuracy", "Likelihood, %", "Forgetting", "KL"),
    *("Trainable parameters", "Training, min", "Peak memory, GiB", "The benchmark's frontier"),
)
NOTE = (
    "Accuracy: share of GSM8K's test questions whose derivation states the right answer. Likelihood: of a token of the "
    "reference solution. Forgetting: loss of the next token on the wiki texts minus the base model's, in nats. KL: "
    "divergence from the base there, nats a token. Of both, lower is better. Brackets: 95 % intervals over questions, "
    "each with its mean over the seeds; ±: deviation between seeds. Time: of the steps alone. Memory: allocated "
    "on a GPU, resident on a CPU. The frontier is that of the benchmark's own points; rows marked as the benchmark's "
    "are what it reports."
)


def jobs(study: Study, settings: MetaMath) -> list[Job]:
    """Score the base, and the adapter of every method and seed with its drift."""
    return [base_job(study, settings), *(run.score for run in all_runs(study, settings))]


def section(study: Study, settings: MetaMath, results: Results) -> Section:
    """A table of accuracy, forgetting and cost beside the benchmark's own points, and the two against each other."""
    rows = all_rows(study, settings, results)
    ours = [row for row in rows if row.forgetting]
    texts = [text for text in (_frontier_told(ours, settings.points), _power(ours)) if text]
    table = Table(NAME, TITLE, COLUMNS, [*_lines(rows, settings.points), *_their_lines(settings)], NOTE)
    figures = [_figure(ours, settings.points)] if ours else []
    measurements = list(_measurements(study, settings, rows))
    return Section(NAME, TITLE, texts, [table], figures, measurements, list(results.missing))


def files(study: Study, settings: MetaMath, results: Results, sections: Sequence[Section]) -> dict[str, str]:
    """Return one file a method and seed in the benchmark's format, of those that are done."""
    made = (result_file(study, settings, run, results) for run in all_runs(study, settings))
    return {f"{NAME}/{name}": text for name, text in filter(None, made)}


def ahead(point: tuple[float, float], others: Sequence[BenchmarkPoint]) -> BenchmarkPoint | None:
    """Return one of the others that is no worse in accuracy and forgetting and better in one; None on the frontier."""
    accuracy, forgetting = point
    for other in others:
        as_good = other.accuracy >= accuracy and other.forgetting <= forgetting
        if as_good and (other.accuracy, other.forgetting) != (accuracy, forgetting):
            return other
    return None


def _lines(rows: Sequence[Row], points: Sequence[BenchmarkPoint]) -> list[tuple[str, list[Cell]]]:
    lines = []
    for row in rows:
        accuracy = row.estimate("accuracy")
        cells = [cell(_hundredth(accuracy), digits=3), cell(row.estimate("likelihood"))]
        if not row.forgetting:
            lines.append((row.title, [*cells, *[NONE] * 6]))
            continue
        cells += [Cell(float(np.mean(v)), sd=spread(v), digits=4) for v in (row.forgetting, row.kl)]
        cells.append(Cell(text=f"{row.parameters:,}"))
        cells.append(_mean(row.seconds, 60))
        cells.append(_mean(row.memory, 2**30))
        cells.append(_place(row.point, points))
        lines.append((row.title, cells))
    return marked(lines, {0: "high", 1: "high", 2: "low", 3: "low"}) if lines else []


def _their_lines(settings: MetaMath) -> list[tuple[str, list[Cell]]]:
    lines = []
    for point in settings.points:
        place = _place((point.accuracy, point.forgetting), settings.points)
        cells = [Cell(point.accuracy, digits=3), NONE, Cell(point.forgetting, digits=4), *[NONE] * 4, place]
        lines.append((f"{point.title} ({THEIRS})", cells))
    return lines


def _hundredth(found: Estimate) -> Estimate:
    values = (found.value, found.low, found.high, found.sd)
    return Estimate(*(None if value is None else value / 100 for value in values))  # type: ignore[arg-type]


def _mean(values: Sequence[float], unit: float) -> Cell:
    return Cell(float(np.mean(values)) / unit, digits=1) if values else NONE


def _place(point: tuple[float, float], points: Sequence[BenchmarkPoint]) -> Cell:
    if not points:
        return NONE
    better = ahead(point, points)
    return Cell(text="on it" if better is None else f"behind its {better.title}")


def _frontier_told(rows: Sequence[Row], points: Sequence[BenchmarkPoint]) -> str:
    if not rows or not points:
        return ""
    better = {row.title: ahead(row.point, points) for row in rows}
    on = [title for title, other in better.items() if other is None]
    behind = [f"{title} (behind its {other.title})" for title, other in better.items() if other is not None]
    told = [f"on the benchmark's frontier or beyond it: {', '.join(on)}"] if on else []
    told += [f"behind it: {', '.join(behind)}"] if behind else []
    text = "; ".join(told)
    return (
        f"{text[0].upper()}{text[1:]}. The benchmark's points are of its own runs, one seed each, by another training "
        "loop: what lies close to one of them is no better and no worse than it."
    )


def _power(rows: Sequence[Row]) -> str:
    """The smallest difference in accuracy that the questions can tell, and how far seeds spread."""
    pairs = [(a, b) for i, a in enumerate(rows) for b in rows[i + 1 :]]
    if not pairs:
        return ""
    halves = [estimate(a.draws["accuracy"] - b.draws["accuracy"]).half or 0 for a, b in pairs]
    spreads = [found for row in rows if (found := spread(row.forgetting)) is not None]
    seeds = (
        f"Between seeds, forgetting has a standard deviation of {float(np.median(spreads)):.4f} nats (median)."
        if spreads
        else "One seed was trained, so nothing is known of how far forgetting varies between seeds."
    )
    return (
        "A difference in accuracy between two methods measured here can be told from none if it is larger than about "
        f"{float(np.median(halves)) / 100:.3f} (median half width of the 95 % intervals of the paired differences). "
        f"{seeds}"
    )


def _figure(rows: Sequence[Row], points: Sequence[BenchmarkPoint]) -> Plot:
    series = []
    for row in rows:
        (x, y), found = row.point, _hundredth(row.estimate("accuracy"))
        low, high = (x if bound is None else bound for bound in (found.low, found.high))
        series.append(Series(row.title, [x], [y], x_low=[low], x_high=[high]))
    if points:
        by_accuracy = sorted(points, key=lambda point: point.accuracy)
        series.append(
            Series(
                THEIRS,
                [point.accuracy for point in by_accuracy],
                [point.forgetting for point in by_accuracy],
                labels=[point.title for point in by_accuracy],
            )
        )
    return Plot(
        f"{NAME}-frontier",
        "What was learned, and what it made the model forget",
        "test accuracy",
        "forgetting (nats a token, lower is better)",
        series,
        kind="points",
    )


def _measurements(study: Study, settings: MetaMath, rows: Sequence[Row]) -> Iterator[Measurement]:
    for row in rows:
        yield from _scores(row, settings)
        if not row.forgetting:
            continue
        more: dict[str, Any] = {
            "seeds": len(row.forgetting),
            "domain": settings.domain,
            "setting": {"text": settings.text},
        }
        for metric, values in (("forgetting", row.forgetting), ("drift", row.kl)):
            found = Estimate(float(np.mean(values)), sd=spread(values))
            yield measurement(NAME, row.title, metric, found, row.jobs, unit="nats/token", **more)
        trained = [run.train for run in all_runs(study, settings) if study.row(run.method).title == row.title]
        costs = (("training time", row.seconds, "s"), ("peak memory", row.memory, "bytes"))
        for metric, values, unit in costs:
            if values:
                found = Estimate(float(np.mean(values)), sd=spread(values))
                yield measurement(NAME, row.title, metric, found, trained, unit=unit, seeds=len(values))
        found = Estimate(float(row.parameters or 0))
        yield measurement(NAME, row.title, "trainable parameters", found, trained)
    yield from _differences([row for row in rows if row.forgetting], settings)


def _scores(row: Row, settings: MetaMath) -> Iterator[Measurement]:
    for form in FORMS:
        items = row.items[form]
        wide = hierarchical({row.title: items})[row.title] if len(items) > 1 else None
        yield measurement(
            NAME,
            row.title,
            "score",
            row.estimate(form),
            row.jobs,
            wide=wide,
            domain=settings.domain,
            form=form,
            unit="%",
            seeds=max(1, len(row.forgetting)),
            items=len(items[0]),
        )


def _differences(rows: Sequence[Row], settings: MetaMath) -> Iterator[Measurement]:
    """Every method against the first, on the same questions."""
    for row in rows[1:]:
        for form in FORMS:
            yield measurement(
                NAME,
                row.title,
                "score difference",
                estimate(row.draws[form] - rows[0].draws[form]),
                [*row.jobs, *rows[0].jobs],
                domain=settings.domain,
                form=form,
                unit="pp",
                seeds=len(row.forgetting),
                setting={"minus": rows[0].title},
            )
