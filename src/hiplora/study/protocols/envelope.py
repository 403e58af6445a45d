"""A method's frontier of learning against drift, and two frontiers compared at equal learning.

The frontier is the lower envelope of a method's points, means over the seeds: at a loss, the lowest drift at which it
learned at least as much. Between points that are neighbours on the grid (the next rate, or the next number of steps)
the drift is interpolated, linear in the loss and logarithmic in the divergence; never beyond them.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

REACHED, NOT_REACHED, PASSED = "reached", "not reached", "passed"
LOSSES = 51  # at which two frontiers are compared, evenly over the losses that both have
_EQUAL = 1e-12


@dataclass(frozen=True)
class Mark:
    """A point of a method: its rate and steps, and by seed `x`, lower is more learned, and `y`, a drift's logarithm."""

    rate: float
    steps: float
    x: NDArray[np.float64]
    y: NDArray[np.float64]

    @functools.cached_property
    def middle(self) -> tuple[float, float]:
        """The means over the seeds."""
        return float(self.x.mean()), float(self.y.mean())


@dataclass(frozen=True)
class Spot:
    """Where a frontier is at some x: between two points, or at one, with the mean log drift there.

    `state`: `reached`; `not reached`, the method never learned that much, and this is where it learned most: it drifts
    further at x; `passed`, all its points learned more, and at x it may drift less.
    """

    y: float
    first: Mark
    second: Mark
    state: str

    def by_seed(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return each seed's log drift at its own x, (seeds,), along the same points and never beyond them."""
        one, two = self.first, self.second
        apart = one.x - two.x
        share = np.where(apart > 0, (one.x - x) / np.where(apart > 0, apart, 1.0), one.x > x).clip(0.0, 1.0)
        return np.asarray((1 - share) * one.y + share * two.y)


class Frontier:
    """The lower envelope of a method's points."""

    def __init__(self, marks: Sequence[Mark]):
        """Take its points, at least one."""
        self.marks = list(marks)
        self.best = min(self.marks, key=lambda mark: mark.middle[0])  # learned most
        self.least, self.most = self.best.middle[0], max(mark.middle[0] for mark in marks)

    def at(self, x: float) -> Spot:
        """Return the frontier's spot at a mean x."""
        if x < self.least:
            return Spot(self.best.middle[1], self.best, self.best, NOT_REACHED)
        state = REACHED if x <= self.most else PASSED
        spots = [Spot(mark.middle[1], mark, mark, state) for mark in self.marks if mark.middle[0] <= x]
        for pair in _neighbours(self.marks):
            one, two = sorted(pair, key=lambda mark: -mark.middle[0])
            (high, start), (low, end) = one.middle, two.middle
            if low < x < high:
                share = (high - x) / (high - low)
                spots.append(Spot((1 - share) * start + share * end, one, two, state))
        return min(spots, key=lambda spot: spot.y)

    def of_seed(self, seed: int) -> "Frontier":
        """Return the frontier of one seed's points, by its place."""
        return Frontier([Mark(mark.rate, mark.steps, mark.x[[seed]], mark.y[[seed]]) for mark in self.marks])


def compared(here: Frontier, there: Frontier, at: Mark | None) -> tuple[NDArray[np.float64], float, str]:
    """Return by seed the log of how many times as far `here` drifts as `there`, at what x, and the state of that.

    Compared at what a point `at` of the other learned or, where that is None, at the most that both learned.
    """
    if at is None and here.least > there.least:
        # The other learned more. If all its points did, it may drift less than the least of them at this loss.
        mark, spot = here.best, there.at(here.least)
        state = NOT_REACHED if spot.state == PASSED else REACHED
        return mark.y - spot.by_seed(mark.x), mark.middle[0], state
    mark = there.best if at is None else at
    spot = here.at(mark.middle[0])
    return spot.by_seed(mark.x) - mark.y, mark.middle[0], spot.state


def share_below(one: Frontier, other: Frontier) -> float | None:
    """Return on what share of the losses that both reached `one` lies below `other`; None where there are none."""
    low, high = max(one.least, other.least), min(one.most, other.most)
    if low > high:
        return None
    losses = np.linspace(low, high, LOSSES) if high > low else np.array([low])
    return float(np.mean([one.at(x).y < other.at(x).y - _EQUAL for x in losses.tolist()]))


def _neighbours(marks: Sequence[Mark]) -> Iterator[tuple[Mark, Mark]]:
    """Yield the pairs that are next to each other in rate at equal steps, and in steps at an equal rate."""
    for kept, ordered in (("steps", "rate"), ("rate", "steps")):
        for value in dict.fromkeys(getattr(mark, kept) for mark in marks):
            line = sorted((m for m in marks if getattr(m, kept) == value), key=lambda m: getattr(m, ordered))
            yield from itertools.pairwise(line)
