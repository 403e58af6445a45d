import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from hiplora.adapters import AdapterUpdate, protect, read_update, remaining, totals
from hiplora.adapters.protection import module_rank, output_energy, project, removal
from hiplora.errors import ConfigError
from hiplora.spectral import MomentBasis, SecondMoment
from tests import reference
from tests.unit.adapters.samples import ATTENTION, product, saved

few = settings(max_examples=40, deadline=None, derandomize=True, database=None)
Q0 = "model.layers.0.self_attn.q_proj"


class Case:
    """Inputs x (T, n) with strong and weak directions, and the factors of an update that reads them."""

    def __init__(self, n, q, m, tokens, seed, kept=None):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        mixing = torch.linalg.qr(draw(n, n)).Q
        self.x = draw(tokens, n) * torch.logspace(0.7, -0.7, n) @ mixing
        self.A, self.B = draw(q, n), draw(m, q)
        self.moment = self.x.double().T @ self.x.double() / tokens
        found = SecondMoment(n)
        found.add(self.x)
        basis = found.eigen()
        self.inputs = MomentBasis(basis.values, basis.vectors[:, : kept or n], basis.tokens)


@st.composite
def cases(draw):
    n = draw(st.integers(1, 20))
    q, m = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    return Case(n, q, m, draw(st.integers(n + 1, 40)), draw(st.integers(0, 2**31)))


strengths = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))
projections = st.sampled_from(["hard", "soft"])


def close(one, other, tol=1e-5):
    torch.testing.assert_close(one.double(), other.double(), rtol=tol, atol=tol)


@few
@given(cases(), st.data(), strengths, projections)
def test_a_projection_is_that_of_the_dense_formula(case, data, strength, projection):
    k = data.draw(st.integers(1, case.A.shape[1]))
    found = project(case.A, case.inputs, k, strength, projection)
    close(found, reference.without_inputs(case.A, case.moment, k, strength, projection), tol=2e-5)
    assert torch.equal(project(case.A, case.inputs, k, 0.0, projection), case.A)


@few
@given(cases(), st.data())
def test_a_hard_projection_leaves_nothing_that_reads_the_directions_and_is_idempotent(case, data):
    k = data.draw(st.integers(1, case.A.shape[1]))
    once = project(case.A, case.inputs, k)
    assert (once @ case.inputs.vectors[:, :k]).abs().max() <= 1e-5 * case.A.norm()
    close(project(once, case.inputs, k), once)


@few
@given(cases(), st.data(), projections)
def test_a_stronger_projection_leaves_less(case, data, projection):
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
    taken = removal(Case(12, 3, 4, 40, 0).inputs, 5, "soft")
    assert (len(taken), taken[4]) == (12, 0.5)
    assert (taken.diff() < 0).all()
    few_inputs = MomentBasis(torch.tensor([2.0, 1.0, 0.0, 0.0]).double(), torch.eye(4), 10)
    assert removal(few_inputs, 3, "soft").tolist() == [1, 1, 0, 0]


@few
@given(cases())
def test_the_output_energy_is_the_mean_over_the_inputs(case):
    expected = reference.output_energy(case.A, case.B, case.x)
    assert output_energy(case.A, case.B, case.inputs) == pytest.approx(expected, rel=1e-4)


def test_of_a_wide_input_the_kept_directions_are_taken_and_the_energy_of_the_rest_is_bounded():
    case = Case(20, 3, 5, 60, 1, kept=8)
    close(project(case.A, case.inputs, 6), reference.without_inputs(case.A, case.moment, 6, 1.0, "hard"))
    exact, found = (
        reference.output_energy(case.A, case.B, case.x),
        output_energy(case.A, case.B, case.inputs),
    )
    assert abs(found - exact) <= case.inputs.values[7] * (case.B @ case.A).norm() ** 2
    with pytest.raises(ConfigError, match=r"layer a\.b: principal_rank 9 .* the 8 eigenvectors .* lower"):
        module_rank(9, case.inputs, "a.b")


def test_a_rank_is_a_number_a_fraction_of_the_width_or_a_share_of_the_energy():
    inputs = Case(20, 2, 2, 60, 2).inputs
    assert [module_rank(spec, inputs) for spec in (7, 0.25, 0.001)] == [7, 5, 1]
    k = module_rank("energy:0.9", inputs)
    assert inputs.energy(k) >= 0.9 > inputs.energy(k - 1)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ((0, 1.0, "hard"), "principal_rank is 0"),
        (("energy:2", 1.0, "hard"), "principal_rank is 'energy:2'"),
        ((4, 1.1, "hard"), r"strength is 1\.1; expected a number from 0"),
        ((4, float("nan"), "hard"), "strength is nan"),
        ((4, 1.0, "medium"), "projection is 'medium'; expected one of hard, soft"),
    ],
)
def test_values_that_make_no_sense_are_refused(values, why):
    with pytest.raises(ConfigError, match=why):
        protect(AdapterUpdate("", "lora", {}, {}), {}, *values)


# A whole adapter


@pytest.fixture(scope="session")
def lora(tiny_model_dir, tmp_path_factory):
    config = LoraConfig(r=4, lora_alpha=16, target_modules=ATTENTION, modules_to_save=["lm_head"])
    return saved(tiny_model_dir, tmp_path_factory.mktemp("lora") / "adapter", config)[0]


def bases_of(update):
    return {module: Case(A.shape[1], 1, 1, 200, i).inputs for i, (module, (A, _)) in enumerate(update.factors.items())}


@pytest.mark.parametrize("name", ["hip", "lora"])
def test_every_module_is_projected_off_its_own_inputs_into_a_plain_update(request, name):
    folder = request.getfixturevalue(name)
    update = read_update(folder if name == "lora" else folder[0])
    bases = bases_of(update)
    after = protect(update, bases, 10)
    assert (after.kind, after.channels, after.base) == ("projected", {}, update.base)
    assert (after.config["peft_type"], after.ranks) == ("LORA", update.ranks)
    assert after.extras.keys() == update.extras.keys()
    rows = remaining(update, after, bases, 10)
    assert [row["module"] for row in rows] == list(update.factors)
    for row in rows:
        before = product(update, row["module"]).double()
        expected = before @ reference.complement(bases[row["module"]].vectors[:, :10])
        close(product(after, row["module"]), expected)
        assert row["norm_share"] == pytest.approx((expected.norm() / before.norm()).item() ** 2, rel=1e-3)
        assert 0 < row["energy_share"] < row["norm_share"] < 1  # what is taken is what is fed most
    shares = [row["energy_share"] for row in rows]
    assert min(shares) < totals(rows)["energy_share"] < max(shares)


def test_of_nothing_nothing_remains(lora):
    update = read_update(lora)
    bases = bases_of(update)
    nothing = protect(update, bases, 64)
    assert totals(remaining(update, update, bases)) == {"norm_share": 1.0, "energy_share": 1.0}
    for before in (update, nothing):
        left = totals(remaining(before, nothing, bases, 64))
        assert left == {"norm_share": 0.0, "energy_share": 0.0}
