import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiplora.adapters import AdapterUpdate, protect, read_update, remaining
from hiplora.adapters.protection import module_rank, project, without_pairs
from hiplora.errors import ConfigError
from hiplora.spectral import MomentBasis, SecondMoment
from tests import reference
from tests.unit.adapters.samples import product

few = settings(max_examples=40, deadline=None, derandomize=True, database=None)


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


def close(one, other, tol=1e-5):
    torch.testing.assert_close(one.double(), other.double(), rtol=tol, atol=tol)


@few
@given(cases(), st.data(), strengths, st.sampled_from(["hard", "soft"]))
def test_a_projection_is_that_of_the_dense_formula(case, data, strength, projection):
    k = data.draw(st.integers(1, case.A.shape[1]))
    projected = project(case.A, case.inputs, k, strength, projection)
    close(projected, reference.without_inputs(case.A, case.moment, k, strength, projection), tol=2e-5)
    assert torch.equal(project(case.A, case.inputs, k, 0.0, projection), case.A)


@few
@given(st.integers(2, 7), st.integers(2, 7), st.integers(1, 3), st.integers(0, 1000), st.data())
def test_the_joint_mask_takes_the_fewest_of_the_strongest_pairs_that_give_the_drift_of_the_projection(
    m, n, q, seed, data
):
    case, gradients = Case(n, q, m, 30, seed), Case(m, 1, 1, 30, seed + 1)
    k, E, F = data.draw(st.integers(1, n)), case.inputs.vectors.double(), gradients.inputs.vectors.double()
    masked = without_pairs((case.A, case.B), case.inputs, gradients.inputs, k)
    C, G = case.moment, gradients.moment
    X = F.T @ (case.B @ case.A).double() @ E

    def kl(X):
        delta = F @ X @ E.T
        return 0.5 * torch.trace(G @ delta @ C @ delta.T).item()

    strip, left = X.clone(), X.clone()
    strip[:, :k] = 0
    weights = torch.outer(gradients.inputs.values, case.inputs.values)
    for i, j in sorted(itertools.product(range(m), range(n)), key=lambda ij: -weights[ij]):
        left[i, j] = 0
        if kl(left) <= kl(strip) + 1e-12 * kl(X):
            break
    close(masked, F @ left @ E.T)


def test_a_joint_mask_keeps_more_of_an_update_than_the_projection_at_the_same_drift(adapters):
    update = read_update(adapters["whole"])
    bases, outputs = bases_of(update), {}
    for place, module in enumerate(update.factors):
        outputs[module] = Case(update.shape(module)[0], 1, 1, 200, 50 + place).inputs
    strips, joint = protect(update, bases, 8), protect(update, bases, 8, outputs=outputs)
    assert joint.ranks == {module: 4 * rank for module, rank in update.ranks.items()}
    for module in update.factors:
        before, *after = (product(one, module).double() for one in (update, strips, joint))
        shares = [(before * one).sum() / before.square().sum() for one in after]
        assert shares[1] > shares[0]
        C, G = (
            b.vectors.double() * b.values.double() @ b.vectors.double().T for b in (bases[module], outputs[module])
        )
        drift = [torch.trace(G @ delta @ C @ delta.T) for delta in after]
        assert drift[1] < 1.5 * drift[0]


def test_where_there_is_no_input_a_soft_projection_takes_what_there_is_and_no_rounding_is_left():
    few_inputs = MomentBasis(torch.tensor([2.0, 1.0, 0.0, 0.0]).double(), torch.eye(4), 10)
    assert project(torch.ones(1, 4), few_inputs, 3, 1.0, "soft").tolist() == [[0, 0, 1, 1]]
    case = Case(12, 3, 4, 40, 0)
    assert not project(case.A, case.inputs, 12).any()


def test_of_a_wide_input_the_kept_directions_are_taken():
    case = Case(20, 3, 5, 60, 1, kept=8)
    close(project(case.A, case.inputs, 6), reference.without_inputs(case.A, case.moment, 6, 1.0, "hard"))
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


def bases_of(update):
    return {module: Case(A.shape[1], 1, 1, 200, i).inputs for i, (module, (A, _)) in enumerate(update.factors.items())}


@pytest.mark.parametrize("name", ["one", "whole"])
def test_every_module_is_projected_off_its_own_inputs_into_a_plain_update(adapters, name):
    update = read_update(adapters[name])
    bases = bases_of(update)
    after = protect(update, bases, 10)
    assert (after.kind, after.channels, after.base) == ("projected", {}, update.base)
    assert (after.config["peft_type"], after.ranks) == ("LORA", update.ranks)
    assert after.extras.keys() == update.extras.keys()
    shares, total = remaining(update, after)
    assert list(shares) == list(update.factors)
    for module, share in shares.items():
        before = product(update, module).double()
        expected = before @ reference.complement(bases[module].vectors[:, :10])
        close(product(after, module), expected)
        assert share == pytest.approx((expected.norm() / before.norm()).item() ** 2, rel=1e-3)
    assert min(shares.values()) < total < max(shares.values()) < 1
    nothing = protect(update, bases, 64)
    assert [remaining(*pair)[1] for pair in ((update, update), (update, nothing), (nothing, nothing))] == [1, 0, 0]
