"""A method's frontier of learning against drift, and two frontiers compared at equal learning.

The frontier is the lower envelope of a method's points, means over the seeds: at a loss, the lowest drift at which it
learned at least as much. Between points that are neighbours on the grid (the next rate, or the next number of steps)
the drift is interpolated, linear in the loss and logarithmic in the divergence; never beyond them.
"""

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

REACHED, NOT_REACHED, PASSED = "reached", "not reached", "passed"
Floats = NDArray[np.float64]


class Frontier:
    """The lower envelope of a method's points."""

    def __init__(self, rates: Floats, steps: Floats, x: Floats, y: Floats):
        """Take its points: rate and steps (points,), and (points, seeds): x, lower is more learned, and log drift y."""
        self.rates, self.steps, self.x, self.y = rates, steps, x, y
        self.mean_x, self.mean_y = x.mean(axis=1), y.mean(axis=1)
        self.best = int(self.mean_x.argmin())  # the point that learned most
        self.least, self.most = float(self.mean_x.min()), float(self.mean_x.max())

    def at(self, x: float) -> tuple[float, tuple[int, int], str]:
        """Return the mean log drift at a mean x, the points that it lies between or at, and its state.

        `reached`; `not reached`, the method never learned that much, and this is where it learned most: it drifts
        further at x; `passed`, all its points learned more, and at x it may drift less.
        """
        if x < self.least:
            return self.mean_y[self.best], (self.best, self.best), NOT_REACHED
        spots = [(self.mean_y[point], (point, point)) for point in np.flatnonzero(self.mean_x <= x).tolist()]
        for pair in self._neighbours():
            one, two = sorted(pair, key=lambda point: -self.mean_x[point])
            if self.mean_x[two] < x < self.mean_x[one]:
                share = (self.mean_x[one] - x) / (self.mean_x[one] - self.mean_x[two])
                spots.append(((1 - share) * self.mean_y[one] + share * self.mean_y[two], (one, two)))
        y, points = min(spots, key=lambda spot: spot[0])
        return y, points, REACHED if x <= self.most else PASSED

    def by_seed(self, x: Floats, points: tuple[int, int]) -> Floats:
        """Return each seed's log drift at its own x, (seeds,), between two points and never beyond them."""
        (x_one, x_two), (y_one, y_two) = self.x[list(points)], self.y[list(points)]
        apart = x_one - x_two
        share = np.where(apart > 0, (x_one - x) / np.where(apart > 0, apart, 1.0), x_one > x).clip(0.0, 1.0)
        return (1 - share) * y_one + share * y_two

    def _neighbours(self) -> Iterator[tuple[int, int]]:
        """Yield the pairs that are next to each other in rate at equal steps, and in steps at an equal rate."""
        for kept, ordered in ((self.steps, self.rates), (self.rates, self.steps)):
            for value in np.unique(kept):
                line = np.flatnonzero(kept == value)
                yield from itertools.pairwise(line[ordered[line].argsort()])


def compared(here: Frontier, there: Frontier, at: int | None) -> tuple[Floats, float, str]:
    """Return by seed the log of how many times as far `here` drifts as `there`, at what x, and the state of that.

    Compared at what a point `at` of the other learned or, where that is None, at the most that both learned.
    """
    if at is None and here.least > there.least:
        # The other learned more. If all its points did, it may drift less than the least of them at this loss.
        _, points, state = there.at(here.least)
        apart = here.y[here.best] - there.by_seed(here.x[here.best], points)
        return apart, here.least, NOT_REACHED if state == PASSED else REACHED
    point = there.best if at is None else at
    x = float(there.mean_x[point])
    _, points, state = here.at(x)
    return here.by_seed(there.x[point], points) - there.y[point], x, state
