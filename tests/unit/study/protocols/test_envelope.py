"""Frontiers of points made by hand."""

import numpy as np
import pytest

from hiplora.study.protocols.envelope import NOT_REACHED, PASSED, REACHED, Frontier


def frontier(*points):
    """A frontier of points (rate, steps, x, drift); x and drift are one number, or one a seed."""
    rates, steps, x, drift = zip(*points, strict=True)
    x, drift = (np.array(one, float).reshape(len(points), -1) for one in (x, drift))
    return Frontier(np.array(rates), np.array(steps, float), x, np.log(drift))


POINTS = [(1e-3, 10, 2.0, 0.01), (1e-2, 10, 1.0, 1.0)]
BENT = [(1e-3, 10, 2.0, 0.01), (2e-3, 10, 1.9, 1.0), (4e-3, 10, 1.0, 1.0)]
STOPS = [(1e-3, 5, 2.0, 0.01), (1e-3, 10, 1.0, 1.0), (1e-2, 10, 0.5, 5.0)]


@pytest.mark.parametrize(
    ("points", "x", "drift", "state"),
    [
        (POINTS, 1.5, 0.1, REACHED),  # log-linear between neighbours
        ([*POINTS, (2e-3, 5, 0.9, 0.02)], 1.5, 0.02, REACHED),  # a point that learned more with less
        (POINTS, 1.0, 1.0, REACHED),
        (POINTS, 0.5, 1.0, NOT_REACHED),  # where it learned most
        (POINTS, 3.0, 0.01, PASSED),  # all points learned more: the lowest of them
        (BENT, 1.5, 1.0, REACHED),  # straight from the first to the last it would be 0.1
        (BENT[::-1], 1.5, 1.0, REACHED),
        (STOPS, 1.5, 0.1, REACHED),  # early stops at one rate
    ],
)
def test_the_drift_of_a_frontier_at_a_loss(points, x, drift, state):
    found = frontier(*points).at(x)
    assert (np.exp(found[0]), found[2]) == (pytest.approx(drift), state)


def test_each_seed_goes_along_the_same_points_at_its_own_loss():
    found = frontier((1e-3, 10, [2.0, 2.0], [0.01, 0.04]), (1e-2, 10, [1.0, 1.0], [1.0, 4.0]))
    _, points, _ = found.at(1.5)
    for x, drift in (([1.5, 1.5], [0.1, 0.4]), ([2.0, 1.0], [0.01, 4.0]), ([9.0, 0.0], [0.01, 4.0])):
        assert np.exp(found.by_seed(np.array(x), points)) == pytest.approx(drift)


def test_a_seed_whose_points_lie_the_other_way_round_takes_the_one_that_learned_enough():
    found = frontier((1e-3, 10, [2.0, 1.1], [0.01, 0.01]), (1e-2, 10, [0.8, 1.2], [1.0, 1.0]))
    _, points, _ = found.at(1.2)
    assert np.exp(found.by_seed(np.array([0.8, 1.3]), points)) == pytest.approx([1.0, 0.01])
