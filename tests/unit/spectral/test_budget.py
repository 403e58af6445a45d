import math

import pytest
import torch

from hiplora.errors import ConfigError
from hiplora.spectral import budget_weights, penalty, penalty_gradient, proximal_step

SIGMA = torch.tensor([8.0, 4.0, 2.0, 1.0])


def test_weights_are_powers_of_the_gains_that_sum_to_one():
    torch.testing.assert_close(budget_weights(SIGMA, 1.0), SIGMA / 15)
    torch.testing.assert_close(budget_weights(SIGMA, 2.0), SIGMA**2 / 85)
    torch.testing.assert_close(budget_weights(SIGMA, 0.5), SIGMA.sqrt() / SIGMA.sqrt().sum())


@pytest.mark.parametrize(("sigma", "gamma"), [(SIGMA, 0.0), (torch.zeros(4), 0.0), (torch.zeros(4), 2.0)])
def test_gamma_zero_and_a_zero_spectrum_weigh_all_directions_alike(sigma, gamma):
    assert torch.equal(budget_weights(sigma, gamma), torch.full((4,), 0.25))


@pytest.mark.parametrize("scale", [1e-38, 1e38])
@pytest.mark.parametrize("gamma", [1.0, 50.0, 1e6])
def test_no_gamma_and_no_scale_overflows(scale, gamma):
    weights = budget_weights(torch.tensor([2.0, 1.0, 0.0]) * scale, gamma)
    assert torch.isfinite(weights).all()
    assert weights.sum().item() == pytest.approx(1)
    assert weights[0] > weights[1] >= weights[2]


def test_zero_gains_weigh_nothing_beside_others():
    assert budget_weights(torch.tensor([1.0, 0.0]), 1.0).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("gamma", [-0.5, math.inf, math.nan])
def test_a_gamma_without_meaning_is_refused(gamma):
    with pytest.raises(ConfigError, match="stability_gamma"):
        budget_weights(SIGMA, gamma)


def test_the_penalty_is_a_differentiable_scalar():
    delta = torch.tensor([1.0, -2.0, 0.0, 3.0], requires_grad=True)
    value = penalty(delta, torch.full((4,), 0.25))
    assert value.item() == pytest.approx(3.5)
    value.backward()
    torch.testing.assert_close(delta.grad, penalty_gradient(delta.detach(), torch.full((4,), 0.25)))


def test_the_proximal_step_shrinks_without_ever_crossing_zero():
    delta, weights = torch.tensor([1.0, -2.0, 0.0, 3.0]), budget_weights(SIGMA, 1.0)
    assert torch.equal(proximal_step(delta, weights, 0.0), delta)
    for step in (1e-3, 1.0, 1e6):
        shrunk = proximal_step(delta, weights, step)
        assert torch.equal(shrunk.sign(), delta.sign())
        assert (shrunk.abs() <= delta.abs()).all()
    torch.testing.assert_close(proximal_step(delta, weights, 0.5), delta / (1 + weights))


@pytest.mark.parametrize("step", [-1.0, math.nan, math.inf])
def test_a_step_without_meaning_is_refused(step):
    with pytest.raises(ConfigError, match="proximal step"):
        proximal_step(torch.ones(4), budget_weights(SIGMA, 1.0), step)
