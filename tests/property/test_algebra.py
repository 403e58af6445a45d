"""The algebra of the method, on random shapes, against the dense formulas of `tests/reference.py`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiplora.spectral import (
    allocate,
    budget_weights,
    fused_factors,
    leak,
    penalty,
    penalty_gradient,
    proximal_step,
    retract,
    truncated_svd,
)
from tests import reference

few = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def total_delta(A, B, delta, U, V, scaling):
    """The dense update of retracted factors, as export writes it."""
    thin_A, thin_B = fused_factors(A, B, delta, U, V, scaling)
    return thin_B @ thin_A


class Case:
    """One random layer: a weight (m, n), its k triplets in float64, and adapter factors of rank r."""

    def __init__(self, m, n, k, r, seed):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        self.weight = draw(m, n)
        self.U, self.sigma, self.V = reference.dense_svd(self.weight, k)
        self.A, self.B, self.delta = draw(r, n), draw(m, r), draw(k)
        self.scaling = float(draw(1).abs()) + 0.1
        self.draw = draw
        self.name = f"Case({m}, {n}, {k}, {r}, {seed})"

    def __repr__(self):
        return self.name

    @property
    def bases(self):
        return self.U, self.V


@st.composite
def cases(draw):
    m, n = draw(st.integers(1, 14)), draw(st.integers(1, 14))
    k, r = draw(st.integers(1, min(m, n))), draw(st.integers(1, 6))
    return Case(m, n, k, r, draw(st.integers(0, 2**31)))


def close(one, other, tol=1e-10):
    torch.testing.assert_close(one, other, rtol=tol, atol=tol)


@few
@given(cases(), st.integers(0, 4))
def test_the_residual_channel_never_touches_the_protected_subspaces_after_any_number_of_steps(case, steps):
    A, B = retract(case.A, case.B, *case.bases)
    close(case.scaling * B @ A, reference.residual_update(case.A, case.B, *case.bases, case.scaling))
    for _ in range(steps):
        A, B = retract(A - case.draw(*A.shape), B - case.draw(*B.shape), *case.bases)
    close(case.U.T @ B, torch.zeros_like(case.U.T @ B))
    close(A @ case.V, torch.zeros_like(A @ case.V))


@few
@given(cases())
def test_retraction_is_idempotent_and_never_lengthens(case):
    once = retract(case.A, case.B, *case.bases)
    for one, two, before in zip(once, retract(*once, *case.bases), (case.A, case.B), strict=True):
        close(one, two)
        assert one.norm() <= before.norm() * (1 + 1e-12)
    assert leak(case.A, case.B, *case.bases) <= 1 + 1e-12


@few
@given(cases(), st.lists(st.booleans(), min_size=14, max_size=14))
def test_a_flip_of_singular_pairs_changes_nothing(case, flips):
    signs = torch.tensor([-1.0 if flip else 1.0 for flip in flips[: len(case.delta)]], dtype=torch.float64)
    flipped = case.U * signs, case.V * signs
    one, other = (
        total_delta(*retract(case.A, case.B, *bases), case.delta, *bases, case.scaling)
        for bases in (case.bases, flipped)
    )
    close(one, other)
    close(allocate(case.B, case.A, *case.bases).gains, allocate(case.B, case.A, *flipped).gains)


@few
@given(cases())
def test_fused_factors_are_equation_1_without_loss_and_their_gains_the_deviations(case):
    retracted = retract(case.A, case.B, *case.bases)
    A, B = fused_factors(*retracted, case.delta, *case.bases, case.scaling)
    assert A.shape[0] == B.shape[1] == case.A.shape[0] + len(case.delta)
    close(B @ A, reference.update(case.A, case.B, case.delta, *case.bases, case.scaling))
    close(allocate(B, A, *case.bases).gains, case.delta)
    nothing = total_delta(case.A, torch.zeros_like(case.B), torch.zeros_like(case.delta), *case.bases, case.scaling)
    assert not nothing.any()


@few
@given(cases(), st.floats(0, 4), st.floats(1e-3, 10))
def test_the_budget_and_its_gradient_are_the_papers(case, gamma, strength):
    weights, delta = budget_weights(case.sigma, gamma), case.delta.clone().requires_grad_()
    close(weights, reference.weights(case.sigma, gamma))
    close(penalty(case.delta, weights), reference.stability(case.delta, case.sigma, gamma))
    reference.total_loss(torch.zeros(()), [(delta, case.sigma)], strength, gamma).backward()
    close(strength * penalty_gradient(case.delta, weights), delta.grad)


@few
@given(cases(), st.floats(0, 4), st.floats(0, 100))
def test_the_proximal_step_is_the_minimiser(case, gamma, step):
    weights = budget_weights(case.sigma, gamma)
    best = proximal_step(case.delta, weights, step)
    objective = lambda x: 0.5 * (x - case.delta).pow(2).sum() + step * penalty(x, weights)  # noqa: E731
    gradient = best - case.delta + step * penalty_gradient(best, weights)
    close(gradient, torch.zeros_like(gradient))
    for _ in range(5):
        assert objective(best) <= objective(best + 0.1 * case.draw(len(best)))


@few
@given(cases())
def test_allocation_in_factor_space_equals_the_dense_one(case):
    result = allocate(case.B, case.A, *case.bases)
    dense = case.B @ case.A
    expected = reference.energy_fractions(dense, *case.bases)
    assert (result.left, result.right, result.both) == pytest.approx(expected, rel=1e-10, abs=1e-12)
    assert result.norm == pytest.approx(dense.norm().item(), rel=1e-10)
    close(result.gains, (case.U.T @ dense @ case.V).diagonal())
    assert 0 <= result.both <= min(result.left, result.right) + 1e-12


@few
@given(cases())
def test_certified_factors_reproduce_the_best_approximation(case):
    factors = truncated_svd(case.weight, len(case.sigma), tol=1e-6)
    ours = ((factors.U * factors.sigma) @ factors.V.T).double()
    # Eckart-Young: no matrix of this rank is closer, and ours is as close as rounding to fp32 allows.
    best = (case.weight - (case.U * case.sigma) @ case.V.T).norm()
    assert (case.weight - ours).norm() <= best + 1e-5 * case.sigma[0]
