"""Frontiers of points made by hand."""

import numpy as np
import pytest

from hiplora.study.protocols.envelope import NOT_REACHED, PASSED, REACHED, Frontier, Mark, share_below


def mark(rate, x, drift, steps=10):
    """A point; `x` and `drift` one number, or one a seed."""
    return Mark(rate, steps, np.atleast_1d(np.array(x, float)), np.log(np.atleast_1d(np.array(drift, float))))


LINE = [mark(1e-3, 2.0, 0.01), mark(1e-2, 1.0, 1.0)]


def test_between_neighbours_the_drift_is_log_linear_in_the_loss():
    spot = Frontier(LINE).at(1.5)
    assert spot.state == REACHED
    assert np.exp(spot.y) == pytest.approx(0.1)


def test_a_point_that_learned_more_with_less_counts_as_it_is():
    spot = Frontier([*LINE, mark(2e-3, 0.9, 0.02, steps=5)]).at(1.5)
    assert np.exp(spot.y) == pytest.approx(0.02)


def test_where_a_method_never_learned_that_much_it_stands_where_it_learned_most():
    spot = Frontier(LINE).at(0.5)
    assert (spot.state, np.exp(spot.y)) == (NOT_REACHED, pytest.approx(1.0))
    assert Frontier(LINE).at(1.0).state == REACHED


def test_where_all_its_points_learned_more_it_stands_at_the_lowest():
    spot = Frontier(LINE).at(3.0)
    assert (spot.state, np.exp(spot.y)) == (PASSED, pytest.approx(0.01))


@pytest.mark.parametrize("order", [1, -1])
def test_only_neighbours_on_the_grid_are_joined(order):
    bent = [mark(1e-3, 2.0, 0.01), mark(2e-3, 1.9, 1.0), mark(4e-3, 1.0, 1.0)]
    # Straight from the first to the last it would be 0.1 at 1.5; through the point between them it is 1.
    assert np.exp(Frontier(bent[::order]).at(1.5).y) == pytest.approx(1.0)


def test_early_stops_at_one_rate_are_joined():
    stops = [mark(1e-3, 2.0, 0.01, steps=5), mark(1e-3, 1.0, 1.0, steps=10), mark(1e-2, 0.5, 5, steps=10)]
    assert np.exp(Frontier(stops).at(1.5).y) == pytest.approx(0.1)


def test_each_seed_goes_along_the_same_points_at_its_own_loss():
    found = Frontier([mark(1e-3, [2.0, 2.0], [0.01, 0.04]), mark(1e-2, [1.0, 1.0], [1.0, 4.0])])
    spot = found.at(1.5)
    assert np.exp(spot.by_seed(np.array([1.5, 1.5]))) == pytest.approx([0.1, 0.4])
    assert np.exp(spot.by_seed(np.array([2.0, 1.0]))) == pytest.approx([0.01, 4.0])
    assert np.exp(spot.by_seed(np.array([9.0, 0.0]))) == pytest.approx([0.01, 4.0]), "never beyond the points"


def test_a_seed_whose_points_lie_the_other_way_round_takes_the_one_that_learned_enough():
    found = Frontier([mark(1e-3, [2.0, 1.1], [0.01, 0.01]), mark(1e-2, [0.8, 1.2], [1.0, 1.0])])
    assert np.exp(found.at(1.2).by_seed(np.array([0.8, 1.3]))) == pytest.approx([1.0, 0.01])


def test_the_share_of_common_losses_on_which_a_frontier_lies_below():
    lower = Frontier([mark(1e-3, 2.5, 0.001), mark(1e-2, 1.0, 0.1)])
    assert share_below(lower, Frontier(LINE)) == 1
    assert share_below(Frontier(LINE), lower) == 0
    assert share_below(lower, lower) == 0
    crossing = Frontier([mark(1e-3, 2.0, 0.1), mark(1e-2, 1.0, 0.1)])
    # LINE is at 0.1 in the middle of the losses, above it where more was learned
    assert share_below(crossing, Frontier(LINE)) == pytest.approx(0.5, abs=0.02)
    assert share_below(lower, Frontier([mark(1e-3, 0.5, 1.0), mark(1e-2, 0.4, 1.0)])) is None


def test_a_seed_has_a_frontier_of_its_own():
    found = Frontier([mark(1e-3, [2.0, 3.0], [0.01, 1]), mark(1e-2, [1.0, 2.0], [1.0, 2])])
    assert np.exp(found.of_seed(1).at(2.0).y) == pytest.approx(2)
