import math

import pytest
import torch

from hiplora.errors import ConfigError
from hiplora.spectral import budget_weights, proximal_step

SIGMA = torch.tensor([8.0, 4.0, 2.0, 1.0])


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


@pytest.mark.parametrize("step", [0.0, 1e-3, 1.0, 1e6])
def test_the_proximal_step_shrinks_without_ever_crossing_zero(step):
    delta = torch.tensor([1.0, -2.0, 0.0, 3.0])
    shrunk = proximal_step(delta, budget_weights(SIGMA, 1.0), step)
    assert torch.equal(shrunk.sign(), delta.sign())
    assert torch.equal(shrunk, delta) if step == 0 else (shrunk.abs() <= delta.abs()).all()


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_a_step_or_a_gamma_without_meaning_is_refused(bad):
    with pytest.raises(ConfigError, match="proximal step"):
        proximal_step(torch.ones(4), SIGMA, bad)
    with pytest.raises(ConfigError, match="stability_gamma"):
        budget_weights(SIGMA, bad)
