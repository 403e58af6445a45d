"""Learning against drift: every method over one grid of learning rates, compared where both learned as much.

The drift of a method at some loss lies on its own frontier (`frontiers.py`), tuned over its rates and early stops. It
is divided by the reference's, seed by seed; the geometric mean over the seeds has the interval of Student's t.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from hiplora.recipes.protocols import Frontier as Settings
from hiplora.reporting.study.spec import Figure, Measurement, Section, Table
from hiplora.study.builder import Study
from hiplora.study.engine.jobs import Job
from hiplora.study.protocols.frontier_compare import Compared, compare
from hiplora.study.protocols.frontier_figures import frontier_figures
from hiplora.study.protocols.frontier_points import LOSS, OVER, Point, base_job, scoring_jobs
from hiplora.study.protocols.frontier_tables import BEST_PLAIN, frontier_tables, frontier_texts
from hiplora.study.protocols.frontiers import NOT_REACHED, PASSED
from hiplora.study.protocols.show import difference, measurement
from hiplora.study.results import Results
from hiplora.study.statistics import Estimate, estimate, spread

NAME, TITLE = "frontier", "Learning against drift"


def jobs(study: Study, settings: Settings) -> list[Job]:
    """Score the base, and every method of a domain at every rate, number of steps and seed."""
    found = [base_job(study, settings)]
    for domain, methods in settings.domains.items():
        for method in methods:
            found += [job for some in scoring_jobs(study, settings, domain, method).values() for job in some]
    return found


def section(study: Study, settings: Settings, results: Results) -> Section:
    """For each domain the points, the drift ratios at equal learning, and who lies below whom."""
    texts: list[str] = []
    tables: list[Table] = []
    figures: list[Figure] = []
    measurements: list[Measurement] = []
    for domain in settings.domains:
        found = compare(study, settings, results, domain)
        if not found.curves:
            continue
        tables += frontier_tables(study, settings, found)
        figures += frontier_figures(study, settings, found)
        texts += frontier_texts(study, settings, found)
        measurements += [*_points(found), *_drops(found), *_ratios(found), *_below(found)]
    return Section(NAME, TITLE, texts, tables, figures, measurements, list(results.missing))


def _setting(point: Point, **more: Any) -> dict[str, Any]:
    steps = {} if point.steps is None else {"steps": point.steps}
    return {"lr": point.rate, **steps, **more}


def _points(found: Compared) -> Iterator[Measurement]:
    """What every point is: loss, own likelihood, drift by text, drop elsewhere."""
    for curve in found.curves:
        for point in curve.points:
            values: list[tuple[str, str, Sequence[float], dict[str, Any]]] = [
                ("held-out loss", "nats/token", point.losses, {}),
                *(("drift", "nats/token", kl, {"text": text}) for text, kl in point.drifts.items()),
            ]
            if point.likelihood is not None:
                values.append(("score", "%", point.likelihood, {}))
            for metric, unit, by_seed, more in values:
                yield measurement(
                    NAME, curve.title, metric, Estimate(float(np.mean(by_seed)), sd=spread(by_seed)), point.jobs,
                    domain=found.domain, form="likelihood" if metric == "score" else "", unit=unit,
                    seeds=len(by_seed), setting=_setting(point, **more),
                )  # fmt: skip
            if point.drop is not None:
                yield measurement(
                    NAME, curve.title, "likelihood drop", estimate(point.drop, point.drop_by_seed), point.jobs,
                    domain=found.domain, form="likelihood", unit="pp", seeds=len(point.losses),
                    setting=_setting(point),
                )  # fmt: skip


def _drops(found: Compared) -> Iterator[Measurement]:
    """The paired difference of the drops elsewhere, each method at its best rate, minus the reference's."""
    best = found.reference.best if found.reference is not None else None
    for curve in found.curves:
        here = curve.best
        if best is None or found.reference is curve or here.drop is None or best.drop is None:
            continue
        sides = (curve.title, here.drop, here.jobs), (found.reference.title, best.drop, best.jobs)  # type: ignore[union-attr]
        yield difference(
            NAME, "likelihood drop", *sides, domain=found.domain, form="likelihood", seeds=len(here.losses),
            setting=_setting(here),
        )  # fmt: skip


def _ratios(found: Compared) -> Iterator[Measurement]:
    if found.reference is None:
        return
    for ratios, plain in ((found.ratios, False), (found.plain, True)):
        for one in ratios:
            told = {"over": found.reference.title, "text": one.text, "state": one.state}
            if one.point is None:  # where the reference is, is between its points
                setting, there = {**told, "operating": True}, found.reference.points
            else:
                setting, there = _setting(one.point, **told, operating=False), [one.point]
            setting["loss" if one.view == LOSS else "likelihood"] = abs(one.x)
            # Of a bound, the side that is open has no end.
            kept = Estimate(
                one.found.value,
                None if one.state == PASSED else one.found.low,
                None if one.state == NOT_REACHED else one.found.high,
            )
            yield measurement(
                NAME, BEST_PLAIN if plain else one.curve.title, f"drift ratio at equal {one.view}", kept,
                [job for point in (*there, *one.curve.points) for job in point.jobs],
                domain=found.domain, unit="ratio", seeds=len(found.reference.best.losses),
                setting={**setting, **({"method": one.curve.title} if plain else {})},
            )  # fmt: skip


def _below(found: Compared) -> Iterator[Measurement]:
    for one in found.below:
        if one.share is None or found.reference is None:
            continue
        counts = {verdict: one.count(verdict) for verdict in ("everywhere", "somewhere", "nowhere")}
        jobs_ = [
            job for curve in (one.curve, found.reference) for point in curve.points for job in point.jobs
        ]
        yield measurement(
            NAME, one.curve.title, "share of losses below", Estimate(one.share), jobs_, domain=found.domain,
            unit="fraction", seeds=len(one.by_seed),
            setting={"than": found.reference.title, "kind": one.curve.kind, "text": OVER, **counts},
        )  # fmt: skip
