"""The figures of the frontiers: the reference with the plain LoRAs, with its own variants, and with the rivals."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from hiplora.recipes.protocols import Frontier as Settings
from hiplora.reporting.study.spec import Figure, Grid, Plot, Series
from hiplora.study.builder import Study
from hiplora.study.protocols.frontier_compare import Compared
from hiplora.study.protocols.frontier_points import OVER, OWN, PLAIN, RIVAL, Curve, Point

NAME = "frontier"
GROUPS = {
    PLAIN: ("lora", "against plain LoRA"),
    OWN: ("own", "and its variants"),
    RIVAL: ("rivals", "against rivals"),
}
LOSS_TOLD, LIKELIHOOD_TOLD = "held-out loss, nats a token", "likelihood on the own task (%)"
NOTE = "Means over the seeds, one mark a rate; lines go along the rates. "
Value = Callable[[Point], float | None]


def frontier_figures(study: Study, settings: Settings, found: Compared) -> list[Figure]:
    """Return a domain's figures: drift by text against the loss, and over all texts against the likelihood, and what
    other tasks lose; for each group of methods that was measured. Points that learned nothing have no place in them:
    one method's highest rates would press all others into a corner.
    """
    title, figures = study.recipe.domains[found.domain].title, list[Figure]()
    for kind, (group, told) in GROUPS.items():
        shown = [curve for curve in found.curves if curve.kind == kind and curve is not found.reference]
        if not shown:
            continue
        if found.reference is not None:
            shown.insert(0, found.reference)
        who = f"{study.row(settings.reference).title} {told}"
        note = NOTE + _left_out(shown)
        learned = [
            replace(curve, points=[point for point in curve.points if point.learned]) for curve in shown
        ]
        figures += _group(f"{NAME}-{found.domain}-{group}", f"{title}: {who}", learned, note)
    return figures


def _left_out(shown: Sequence[Curve]) -> str:
    """Name the points that learned nothing."""
    nothing = {
        curve.title: list(dict.fromkeys(f"{point.rate:g}" for point in curve.points if not point.learned))
        for curve in shown
    }
    told = "; ".join(f"{title} at {', '.join(rates)}" for title, rates in nothing.items() if rates)
    return f"Left out, since the untrained model is better: {told}. " if told else ""


def _group(name: str, title: str, shown: Sequence[Curve], about: str) -> list[Figure]:
    texts = list(dict.fromkeys(text for curve in shown for point in curve.points for text in point.drifts))
    kl = "KL from the base, nats a token"
    figures: list[Figure] = []
    if texts:
        panels = [
            Plot(f"{name}-{place}", text, LOSS_TOLD, kl, _series(shown, _loss, _drift(text)), y_log=True)
            for place, text in enumerate(texts)
        ]
        figures.append(
            Grid(name, f"{title}, drift against loss", panels, f"{about}Lower and further left is better.")
        )
        by_score = _series(shown, _likelihood, _drift(OVER))
        note = f"{about}Lower and further right is better."
        told = f"{title}, drift over all texts against likelihood"
        figures.append(Plot(f"{name}-likelihood", told, LIKELIHOOD_TOLD, kl, by_score, y_log=True, note=note))
    drops = _series(shown, _loss, lambda point: None if point.drop is None else float(point.drop[0]))
    if drops:
        told, y = f"{title}, what other tasks lose", "fall of other likelihoods (pp)"
        note = f"{about}Lower and further left is better."
        figures.append(Plot(f"{name}-drop", told, LOSS_TOLD, y, drops, note=note))
    return figures


def _series(shown: Sequence[Curve], x: Value, y: Value) -> list[Series]:
    """A line for every method and number of steps, of the points that have both values."""
    found = []
    for curve in shown:
        for steps in dict.fromkeys(point.steps for point in curve.points):
            line = sorted((p for p in curve.points if p.steps == steps), key=lambda point: point.rate)
            values = [(x(point), y(point)) for point in line]
            known = [(a, b) for a, b in values if a is not None and b is not None]
            name = curve.title if steps is None else f"{curve.title}, {steps} steps"
            if known:
                found.append(Series(name, [a for a, _ in known], [b for _, b in known]))
    return found


def _loss(point: Point) -> float:
    return point.loss


def _likelihood(point: Point) -> float | None:
    return None if point.likelihood is None else float(np.mean(point.likelihood))


def _drift(text: str) -> Value:
    def value(point: Point) -> float | None:
        return point.drift(text) if text in point.drifts else None

    return value
