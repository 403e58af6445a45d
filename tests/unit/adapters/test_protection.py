import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiplora.adapters import AdapterUpdate, protect
from hiplora.adapters.protection import (
    check_projection,
    check_widths,
    module_rank,
    output_energy,
    project,
    removal,
)
from hiplora.errors import ConfigError
from hiplora.spectral import MomentBasis
from tests import reference
from tests.unit.adapters.inputs import Case

few = settings(max_examples=40, deadline=None, derandomize=True, database=None)
Q0 = "model.layers.0.self_attn.q_proj"


@st.composite
def cases(draw):
    n = draw(st.integers(1, 20))
    q, m = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    return Case(n, q, m, draw(st.integers(n + 1, 40)), draw(st.integers(0, 2**31)))


strengths = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))
projections = st.sampled_from(["hard", "soft"])


def close(one, other, tol=1e-5):
    torch.testing.assert_close(one.double(), other.double(), rtol=tol, atol=tol)


# One module


@few
@given(cases(), st.data(), strengths, projections)
def test_a_projection_is_that_of_the_dense_formula(case, data, strength, projection):
    k = data.draw(st.integers(1, case.A.shape[1]))
    found = project(case.A, case.inputs, k, strength, projection)
    expected = reference.without_inputs(case.A, case.moment, k, strength, projection)
    close(found, expected, tol=2e-5)
    assert found.dtype == case.A.dtype


@few
@given(cases(), projections)
def test_strength_zero_changes_no_bit(case, projection):
    assert torch.equal(project(case.A, case.inputs, 1, 0.0, projection), case.A)


@few
@given(cases(), st.data())
def test_after_a_hard_projection_nothing_reads_the_directions(case, data):
    k = data.draw(st.integers(1, case.A.shape[1]))
    left = project(case.A, case.inputs, k)
    assert (left @ case.inputs.vectors[:, :k]).abs().max() <= 1e-5 * case.A.norm()


@few
@given(cases(), st.data())
def test_projecting_twice_hard_is_projecting_once(case, data):
    k = data.draw(st.integers(1, case.A.shape[1]))
    once = project(case.A, case.inputs, k)
    close(project(once, case.inputs, k), once)


@few
@given(cases(), st.data(), projections)
def test_a_stronger_projection_leaves_less_and_none_leaves_more(case, data, projection):
    k = data.draw(st.integers(1, case.A.shape[1]))
    left = [project(case.A, case.inputs, k, strength, projection) for strength in (0, 0.3, 0.7, 1)]
    energies = [output_energy(A, case.B, case.inputs) for A in left]
    norms = [(case.B @ A).norm() for A in left]
    for before, after in [*itertools.pairwise(energies), *itertools.pairwise(norms)]:
        assert after <= before * (1 + 1e-6)


def test_all_directions_taken_away_leave_zeros_and_no_rounding():
    case = Case(12, 3, 4, 40, 0)
    assert not project(case.A, case.inputs, 12).any()


def test_the_soft_filter_takes_half_of_direction_k_and_more_of_stronger_ones():
    case = Case(12, 3, 4, 40, 0)
    taken = removal(case.inputs, 5, "soft")
    assert len(taken) == 12
    assert taken[4] == 0.5
    assert (taken.diff() < 0).all()
    assert 0 < taken[-1] < 0.1


def test_where_the_inputs_have_fewer_directions_than_k_the_soft_filter_takes_those_that_there_are():
    basis = MomentBasis(torch.tensor([2.0, 1.0, 0.0, 0.0]).double(), torch.eye(4), 10)
    assert removal(basis, 3, "soft").tolist() == [1, 1, 0, 0]


# What is left


@few
@given(cases())
def test_the_output_energy_is_the_mean_over_the_inputs(case):
    expected = reference.output_energy(case.A, case.B, case.x)
    assert output_energy(case.A, case.B, case.inputs) == pytest.approx(expected, rel=1e-4)


def wide(monkeypatch, kept, case):
    monkeypatch.setattr("hiplora.spectral.moments.MAX_VECTORS", kept)
    inputs = case.inputs
    assert inputs.vectors.shape == (case.x.shape[1], kept)
    return inputs


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
def test_of_a_wide_input_the_kept_directions_are_taken_and_the_rest_is_left_alone(monkeypatch, strength):
    case = Case(20, 3, 5, 60, 1)
    inputs = wide(monkeypatch, 8, case)
    expected = reference.without_inputs(case.A, case.moment, 6, strength, "hard")
    close(project(case.A, inputs, 6, strength), expected)
    E = inputs.vectors.double()
    known = E * inputs.values[:8] @ E.T
    soft = project(case.A, inputs, 6, strength, "soft")
    close(soft, reference.without_inputs(case.A, known, 6, strength, "soft"))


def test_of_a_wide_input_the_energy_is_off_by_less_than_the_weakest_kept_direction_explains(monkeypatch):
    case = Case(20, 3, 5, 60, 1)
    exact = reference.output_energy(case.A, case.B, case.x)
    inputs = wide(monkeypatch, 8, case)
    found = output_energy(case.A, case.B, inputs)
    assert found != pytest.approx(exact, rel=1e-9)
    assert abs(found - exact) <= inputs.values[7] * (case.B @ case.A).norm() ** 2


def test_of_a_wide_input_whose_weak_directions_are_alike_the_energy_is_exact(monkeypatch):
    case = Case(20, 3, 5, 60, 1)
    values, vectors = torch.linalg.eigh(case.moment)
    values, vectors = values.flip(0), vectors.flip(1)
    values[8:] = values[8:].mean()
    inputs = MomentBasis(values, vectors[:, :8].float(), 60)
    update = case.B.double() @ case.A.double()
    expected = torch.trace(update @ (vectors * values @ vectors.T) @ update.T).item()
    assert output_energy(case.A, case.B, inputs) == pytest.approx(expected, rel=1e-5)


# How many directions


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_an_energy_is_the_smallest_k_that_holds_it(energy):
    case = Case(20, 2, 2, 60, 2)
    k = module_rank(f"energy:{energy}", case.inputs)
    shares = [case.inputs.energy(i) for i in range(21)]
    assert shares[k] >= energy > shares[k - 1]
    assert 1 < k < 20


def test_a_number_is_taken_as_it_is_and_a_fraction_is_one_of_the_width():
    case = Case(20, 2, 2, 60, 2)
    assert module_rank(7, case.inputs) == 7
    assert module_rank(0.25, case.inputs) == 5
    assert module_rank(0.001, case.inputs) == 1


@pytest.mark.parametrize(
    ("spec", "k"), [(9, "9"), (0.5, "0.5, which is 10 here,"), ("energy:0.999", "energy:0.999")]
)
def test_more_directions_than_are_kept_is_refused_with_layer_value_and_way_out(monkeypatch, spec, k):
    inputs = wide(monkeypatch, 8, Case(20, 2, 2, 60, 2))
    with pytest.raises(ConfigError, match=rf"layer a\.b: principal_rank {k}.* the 8 eigenvectors .* lower"):
        module_rank(spec, inputs, "a.b")


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ((0, 1.0, "hard"), "principal_rank is 0"),
        ((1.5, 1.0, "hard"), r"principal_rank is 1\.5"),
        (("energy:2", 1.0, "hard"), "principal_rank is 'energy:2'"),
        (("many", 1.0, "hard"), "principal_rank is 'many'"),
        ((4, 1.1, "hard"), r"strength is 1\.1; expected a number from 0"),
        ((4, -0.1, "hard"), r"strength is -0\.1"),
        ((4, float("nan"), "hard"), "strength is nan"),
        ((4, True, "hard"), "strength is True"),
        ((4, 1.0, "medium"), "projection is 'medium'; expected one of hard, soft"),
    ],
)
def test_values_that_make_no_sense_are_refused(values, why):
    with pytest.raises(ConfigError, match=why):
        check_projection(*values)
    with pytest.raises(ConfigError, match=why):
        protect(AdapterUpdate("", "lora", {}, {}), {}, *values)


def test_a_rank_that_no_measurement_can_help_is_refused_before_one():
    update = AdapterUpdate("", "lora", {}, {"a": (torch.ones(2, 6), torch.ones(3, 2))})
    check_widths(update, 6)
    check_widths(update, "energy:0.9")
    with pytest.raises(ConfigError, match="layer a: principal_rank 7 exceeds the 6 eigenvectors"):
        check_widths(update, 7)
