"""The methods of a domain against the reference: drift at equal learning, and who lies below whom."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hiplora.recipes.protocols import Frontier as Settings
from hiplora.study.builder import Study
from hiplora.study.protocols.frontier_points import LIKELIHOOD, LOSS, OVER, Curve, Point, curves
from hiplora.study.protocols.frontiers import NOT_REACHED, share_below
from hiplora.study.results import Results
from hiplora.study.statistics import Estimate, geometric


@dataclass(frozen=True)
class Ratio:
    """How many times as far a method drifts as the reference's point at what that learned, paired by seed.

    `state` is that of `Spot`: the ratio is a lower bound where the method did not reach the point, an upper bound where
    all its points learned more.
    """

    curve: Curve
    point: Point
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
    """A domain's methods, and the reference's points that they are compared at; `best` has its lowest loss.

    `ratios` are those of every other method at every point; `plain`, of the best plain LoRA at each.
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
        for point in reference.points
        for view in (LOSS, LIKELIHOOD)
        for text in point.drifts
    ]
    ratios = [ratio(curve, *one) for one in asked for curve in others]
    plain = [best_plain(others, settings.plain, *one) for one in asked]
    return Compared(
        domain,
        found,
        reference,
        [one for one in ratios if one is not None],
        [one for one in plain if one is not None],
        [one for curve in others if (one := _who(curve, reference)) is not None],
    )


def _who(curve: Curve, reference: Curve) -> Below | None:
    here, there = curve.frontier(LOSS, OVER), reference.frontier(LOSS, OVER)
    if here is None or there is None:
        return None
    seeds = range(len(reference.best.losses))
    by_seed = [share_below(here.of_seed(seed), there.of_seed(seed)) for seed in seeds]
    return Below(curve, share_below(here, there), by_seed)


def ratio(curve: Curve, point: Point, view: str, text: str) -> Ratio | None:
    """Compare a method's frontier with a point of the reference at equal learning; None without the measurements."""
    frontier, mark = curve.frontier(view, text), point.mark(view, text)
    if frontier is None or mark is None:
        return None
    spot = frontier.at(mark.middle[0])
    return Ratio(
        curve, point, view, text, spot.state, geometric(np.exp(spot.by_seed(mark.x) - mark.y).tolist())
    )


def best_plain(
    curves: Sequence[Curve], plain: Sequence[str], point: Point, view: str, text: str
) -> Ratio | None:
    """Return the ratio of the plain LoRA that drifts least at what a point learned, by the mean.

    Those that learned as much count before those that did not, of which the least drift is taken, in their favour.
    """
    found = [ratio(curve, point, view, text) for curve in curves if curve.name in plain]
    known = [one for one in found if one is not None]
    return min(known, key=lambda one: (one.state == NOT_REACHED, one.found.value), default=None)
