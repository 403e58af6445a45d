"""The activation basis against its definition, dense and in float64."""

import math

import pytest
import torch

from hiplora.errors import FactorError
from hiplora.spectral import (
    MomentBasis,
    SecondMoment,
    activation_factors,
    factor_mismatch,
    rank_for_energy,
    truncated_svd,
)
from hiplora.spectral.activation import unite, united_factors
from tests import reference


def inputs_of(tokens=500, n=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.arange(1, n + 1, dtype=torch.float32) ** -1.0
    mixing = torch.linalg.qr(torch.randn(n, n, generator=generator)).Q
    return torch.randn(tokens, n, generator=generator) * scales @ mixing + 0.1


def basis_of(inputs):
    moment = SecondMoment(inputs.shape[1])
    moment.add(inputs)
    return moment.eigen()


def outputs_of(m, q):
    generator = torch.Generator().manual_seed(8)
    vectors = torch.linalg.qr(torch.randn(m, q, generator=generator)).Q
    return MomentBasis(torch.arange(q, 0, -1).double() ** 2, vectors, 100)


def weight_of(m=16, n=24, seed=1):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def same_subspace(one, other):
    cosines = torch.linalg.svdvals(one.double().T @ other.double())
    return cosines.min().item() > 1 - 1e-6


def test_the_moment_is_the_mean_outer_product_however_the_tokens_are_split():
    x = inputs_of()
    whole, pieces = SecondMoment(24), SecondMoment(24)
    whole.add(x)
    for piece in x.split(7):
        pieces.add(piece)
    assert whole.tokens == pieces.tokens == 500
    torch.testing.assert_close(pieces.total, whole.total, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole.total, x.double().T @ x.double(), rtol=1e-12, atol=1e-12)


def test_eigenvalues_energy_and_ranks_by_hand():
    moment = SecondMoment(3)
    moment.add(torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))  # C = diag(2, 1/2, 0)
    basis = moment.eigen()
    torch.testing.assert_close(basis.values, torch.tensor([2.0, 0.5, 0.0], dtype=torch.float64))
    assert basis.energy(1) == pytest.approx(0.8)
    assert basis.energy(3) == pytest.approx(1.0)
    assert basis.effective_rank == pytest.approx(math.exp(-0.8 * math.log(0.8) - 0.2 * math.log(0.2)))
    assert [rank_for_energy(basis.values, energy) for energy in (0.5, 0.8, 0.9, 1.0)] == [1, 1, 2, 2]
    empty = basis_of(torch.zeros(4, 3))
    assert (empty.energy(2), empty.effective_rank, rank_for_energy(empty.values, 0.9)) == (0.0, 0.0, 1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_inputs_that_are_not_finite_name_the_layer(value):
    moment = SecondMoment(3)
    moment.add(torch.tensor([[1.0, value, 0.0]]))
    with pytest.raises(FactorError, match=r"layer mlp\.up: its inputs have NaN"):
        moment.eigen("mlp.up")


@pytest.mark.parametrize("sides", ["input", "both", "output"])
@pytest.mark.parametrize("shape", [(16, 24), (40, 24)])
def test_factors_follow_their_definition(sides, shape):
    x, weight, k = inputs_of(), weight_of(*shape), 5
    outputs = outputs_of(shape[0], 7)
    factors = activation_factors(weight, basis_of(x), k, sides, outputs if sides != "input" else None)
    moment = x.double().T @ x.double() / len(x)
    W = weight.double()
    vectors = torch.linalg.eigh(moment).eigenvectors
    assert same_subspace(factors.V, vectors.flip(1)[:, :k])
    images = torch.linalg.qr(W @ vectors.flip(1)[:, :k]).Q
    assert same_subspace(factors.U, images if sides == "input" else outputs.vectors[:, :k])
    core = factors.U.double().T @ W @ factors.V.double()
    torch.testing.assert_close(core, factors.sigma.double().diag(), rtol=1e-5, atol=1e-5)
    assert (torch.cat([factors.sigma.diff(), -factors.sigma]) <= 1e-6).all()
    assert factors.orthogonality < 5e-6
    assert factors.residual == pytest.approx(reference.residual(weight, factors), rel=1e-4)
    assert factors.basis == f"activation:{sides}"


def small(kept, width):
    return MomentBasis(torch.ones(kept), torch.eye(width)[:, :kept], 1)


@pytest.mark.parametrize(
    ("weight", "k", "inputs", "outputs", "why"),
    [
        (weight_of(), 17, None, None, r"exceeds min\(out, in\) = 16"),
        (weight_of(), 0, None, None, "below 1"),
        (weight_of(16, 23), 4, None, None, "23 inputs, and the calibration has 24 of 24 numbers"),
        (weight_of() * math.nan, 4, None, None, "NaN or Inf"),
        (weight_of(), 4, small(3, 24), None, "24 inputs, and the calibration has 3 of 24 numbers"),
        (weight_of(), 4, None, None, "16 outputs, .* has 0 of 0"),
        (weight_of(), 4, None, small(3, 16), "16 outputs, .* has 3 of 16"),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_the_layer(weight, k, inputs, outputs, why):
    sides = "both" if "outputs" in why else "input"
    with pytest.raises(FactorError, match=f"layer here: .*{why}"):
        activation_factors(weight, inputs or basis_of(inputs_of()), k, sides, outputs, name="here")


def test_the_leading_and_the_last_eigenvectors_alone_are_those_of_all():
    moment = SecondMoment(24)
    moment.add(inputs_of(tokens=300))
    dense = torch.linalg.eigh(moment.total / 300)
    leading, last = moment.leading(3), moment.trailing(3)
    assert same_subspace(leading.vectors, dense.eigenvectors.flip(1)[:, :3])
    assert same_subspace(last.vectors, dense.eigenvectors[:, :3])
    torch.testing.assert_close(leading.values, dense.eigenvalues.flip(0)[:3])
    torch.testing.assert_close(last.values, dense.eigenvalues[:3].flip(0))
    assert moment.leading(30).vectors.shape == moment.trailing(30).vectors.shape == (24, 24)


@pytest.mark.parametrize("sides", ["input", "both", "output"])
def test_the_soft_filter_of_the_factors_is_that_of_the_moments(sides):
    """(I + C/ε)⁻¹ with ε the k-th eigenvalue, inside the k leading directions."""
    x, k = inputs_of(), 6
    inputs, outputs = basis_of(x), outputs_of(16, k)
    factors = activation_factors(weight_of(), inputs, k, sides, outputs)
    for shrink, directions, moment in (
        (factors.shrink_V, factors.V, inputs if sides != "output" else None),
        (factors.shrink_U, factors.U, outputs if sides != "input" else None),
    ):
        assert (shrink is None) == (moment is None)
        if moment is not None:
            top = moment.values[:k].float()
            expected = moment.vectors[:, :k] * (top / (top + top[-1])) @ moment.vectors[:, :k].T
            torch.testing.assert_close(directions @ shrink @ directions.T, expected, rtol=0, atol=1e-5)


def test_a_weight_that_is_all_zero_still_gets_a_basis():
    factors = activation_factors(torch.zeros(16, 24), basis_of(inputs_of()), 4)
    assert factors.orthogonality < 5e-6 > factors.sigma.max()


@pytest.mark.parametrize("basis", ["weight", "input", "both"])
def test_factors_fit_their_weight_also_when_it_was_rounded_and_no_other(basis):
    weight = weight_of()
    if basis == "weight":
        factors = truncated_svd(weight, 4)
    else:
        factors = activation_factors(weight, basis_of(inputs_of()), 4, basis, outputs_of(16, 4))
    parts = factors.U, factors.sigma, factors.V, factors.basis
    assert factor_mismatch(weight, *parts) < 1e-5
    assert factor_mismatch(weight + 0.02 * torch.randn(16, 24), *parts) < 0.1
    assert factor_mismatch(weight_of(seed=9), *parts) > 0.3


def orthonormal(n, k, seed):
    return torch.linalg.qr(torch.randn(n, k, generator=torch.Generator().manual_seed(seed))).Q


def outside(basis, directions):
    return (directions - basis @ (basis.T @ directions)).norm()


def test_a_union_spans_all_bases_with_the_first_one_first_and_nothing_twice():
    first, second = orthonormal(12, 3, 0), orthonormal(12, 4, 1)
    union = unite([first, second], 12)
    torch.testing.assert_close(union.T @ union, torch.eye(7), atol=1e-6, rtol=0)
    assert max(outside(union, one) for one in (first, second)) < 1e-5
    assert outside(unite([first, second], 4)[:, :3], first) < 1e-5
    assert unite([first, first @ orthonormal(3, 3, 2)], 12).shape == (12, 3)


@pytest.mark.parametrize(("before", "k"), [(4, 7), (9, 10)])
def test_united_factors_protect_both_sides_and_are_diagonal(before, k):
    weight, U, V = weight_of(20, 24), orthonormal(20, before, 4), orthonormal(24, before, 5)
    factors = united_factors(weight, (U, V), truncated_svd(weight, 3))
    assert factors.rank == k  # at most half of the smaller side
    torch.testing.assert_close(factors.U.T @ weight @ factors.V, factors.sigma.diag(), atol=1e-4, rtol=0)
    assert max(outside(factors.U, U), outside(factors.V, V)) < 1e-4
