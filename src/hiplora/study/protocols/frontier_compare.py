"""The methods of a domain against the reference: drift at equal learning, and who lies below whom."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hiplora.recipes.protocols import Frontier as Settings
from hiplora.study.builder import Study
from hiplora.study.protocols.frontier_points import LIKELIHOOD, LOSS, OVER, Curve, Point, curves
from hiplora.study.protocols.frontiers import NOT_REACHED, PASSED, REACHED, share_below
from hiplora.study.results import Results
from hiplora.study.statistics import Estimate, geometric


@dataclass(frozen=True)
class Ratio:
    """How many times as far a method drifts as the reference where both have learned as much, paired by seed.

    Compared at what a `point` of the reference learned or, where that is None, at the most that both learned. `x` is
    how much: the loss, or minus the likelihood. `state` is that of `Spot`: the ratio is a lower bound where the method
    never learned that much, an upper bound where all its points learned more.
    """

    curve: Curve
    point: Point | None
    x: float
    view: str
    text: str
    state: str
    found: Estimate


@dataclass(frozen=True)
class Below:
    """On what share of their common losses a method lies below the reference: on the mean, and by seed."""

    curve: Curve
    share: float | None
    by_seed: list[float | None]

    def count(self, verdict: str) -> int:
        """Return in how many seeds it lies below everywhere, somewhere, or nowhere."""
        return sum(below_told(share) == verdict for share in self.by_seed)


@dataclass(frozen=True)
class Compared:
    """A domain's methods against the reference.

    `ratios` are those of every other method at every point of the reference, and at the most that both learned;
    `plain`, of the best plain LoRA at each.
    """

    domain: str
    curves: list[Curve]
    reference: Curve | None
    ratios: list[Ratio]
    plain: list[Ratio]
    below: list[Below]


def below_told(share: float | None) -> str:
    """Say where a method lies below the reference."""
    if share is None:
        return "no common losses"
    return "nowhere" if share == 0 else "everywhere" if share == 1 else "somewhere"


def compare(study: Study, settings: Settings, results: Results, domain: str) -> Compared:
    """Compare a domain's methods with the reference, as far as their points are there."""
    found = curves(study, settings, results, domain)
    reference = next((curve for curve in found if curve.name == settings.reference), None)
    if reference is None:
        return Compared(domain, found, None, [], [], [])
    others = [curve for curve in found if curve is not reference]
    asked = [
        (point, view, text)
        for point in (None, *reference.points)
        for view in (LOSS, LIKELIHOOD)
        for text in (point or reference.best).drifts
    ]
    ratios: list[Ratio] = []
    plain: list[Ratio] = []
    for point, view, text in asked:
        compared = (_ratio(curve, reference, point, view, text) for curve in others)
        known = [ratio for ratio in compared if ratio is not None]
        ratios += known
        plain += _best([ratio for ratio in known if ratio.curve.name in settings.plain])
    below = [one for curve in others if (one := _who(curve, reference)) is not None]
    return Compared(domain, found, reference, ratios, plain, below)


def _who(curve: Curve, reference: Curve) -> Below | None:
    here, there = curve.frontier(LOSS, OVER), reference.frontier(LOSS, OVER)
    if here is None or there is None:
        return None
    seeds = range(len(reference.best.losses))
    by_seed = [share_below(here.of_seed(seed), there.of_seed(seed)) for seed in seeds]
    return Below(curve, share_below(here, there), by_seed)


def _ratio(curve: Curve, reference: Curve, point: Point | None, view: str, text: str) -> Ratio | None:
    """Compare a method with the reference at equal learning; None without the measurements."""
    here, there = curve.frontier(view, text), reference.frontier(view, text)
    if here is None or there is None:
        return None
    mark = there.best if point is None else point.mark(view, text)
    if mark is None:
        return None
    if point is None and here.least > there.least:
        # The reference learned more. If all its points did, it may drift less than the least of them at this loss.
        mark, spot = here.best, there.at(here.least)
        apart, state = mark.y - spot.by_seed(mark.x), NOT_REACHED if spot.state == PASSED else REACHED
    else:
        spot = here.at(mark.middle[0])
        apart, state = spot.by_seed(mark.x) - mark.y, spot.state
    return Ratio(curve, point, mark.middle[0], view, text, state, geometric(np.exp(apart).tolist()))


def _best(plain: Sequence[Ratio]) -> list[Ratio]:
    """The plain LoRA that drifts least, by the mean: one, or none.

    Those that learned as much count before those that did not, of which the least drift is taken, in their favour.
    """
    return sorted(plain, key=lambda one: (one.state == NOT_REACHED, one.found.value))[:1]
