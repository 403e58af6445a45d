"""Directions of a weight, interventions on them, and what each costs."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hiplora.errors import ConfigError
from hiplora.probing import choose_directions, directions_of, find_modules, intervened, intervention_factor, probe
from hiplora.spectral import SecondMoment
from tests.tiny import tiny_llama

NAME = "model.layers.1.self_attn.k_proj"


def direction_of(model, name=NAME, index=3):
    return next(d for d in directions_of(model, [name], 32, "even") if d.index == index)


@pytest.mark.parametrize(("name", "factor"), [("zero", -1.0), ("flip", -2.0), ("noise_0.1", 0.1 * 1.5)])
def test_an_intervention_adds_its_multiple_of_one_component_and_the_very_same_weight_is_back_after_an_error(
    name, factor
):
    model = tiny_llama()
    module, direction = model.get_submodule(NAME), direction_of(model)
    weight, bits, flag = module.weight, module.weight.detach().clone(), module.weight.requires_grad
    U, sigma, Vt = torch.linalg.svd(bits.double(), full_matrices=False)
    expected = bits.double() + factor * sigma[3] * torch.outer(U[:, 3], Vt[3])
    with pytest.raises(RuntimeError, match="boom"), intervened(model, direction, intervention_factor(name, 1.5)):
        torch.testing.assert_close(module.weight.detach().double(), expected, atol=1e-7, rtol=0)
        raise RuntimeError("boom")
    assert module.weight is weight
    assert torch.equal(weight, bits)
    assert weight.requires_grad is flag


def test_a_tied_weight_leaves_the_other_alone():
    model = tiny_llama(tie=True)
    embedded = model.get_input_embeddings().weight.detach().clone()
    with intervened(model, direction_of(model, "lm_head", 0), -1.0):
        assert torch.equal(model.get_input_embeddings().weight, embedded)
        assert not torch.equal(model.lm_head.weight, embedded)


def test_a_transposed_layer_is_changed_the_same_way():
    linear, conv = nn.Linear(12, 8, bias=False), Conv1D(8, 12)
    conv.weight = nn.Parameter(linear.weight.detach().T.clone())
    inputs, outputs = torch.randn(5, 12), []
    for model in (nn.ModuleDict({"a": linear}), nn.ModuleDict({"a": conv})):
        (direction,) = directions_of(model, ["a"], 1)
        assert (direction.u.shape, direction.v.shape) == ((8,), (12,))
        with intervened(model, direction, -1.0):
            outputs.append(model["a"](inputs))
    torch.testing.assert_close(*outputs)
    assert not torch.allclose(outputs[0], linear(inputs))


@pytest.mark.parametrize("name", ["zap", "noise", "noise_0", "noise_inf", "zero_0.1", "noise_x"])
def test_an_unknown_intervention_is_refused(name):
    with pytest.raises(ConfigError, match=f"intervention '{name}': expected zero, flip, or noise_S"):
        intervention_factor(name)


def test_different_directions_come_in_order_dense_among_the_strong_or_even():
    assert choose_directions(1001, 4, "log") == [0, 9, 99, 1000]
    assert choose_directions(1001, 5, "even") == [0, 250, 500, 750, 1000]
    for how in ("log", "even"):
        for count, size in ((1, 1), (1, 40), (7, 40), (39, 40), (40, 40)):
            chosen = choose_directions(size, count, how)
            assert chosen == sorted(set(chosen) & set(range(size)))
            assert len(chosen) == count
    for count, said in ((2, "2 directions of 1"), (0, "0 dir")):
        with pytest.raises(ConfigError, match=said):
            choose_directions(1, count)


def test_directions_are_the_exact_singular_triplets_to_the_last():
    model = tiny_llama()
    weight = model.get_submodule(NAME).weight.detach().double()
    directions = list(directions_of(model, [NAME], 32))
    assert [d.index for d in directions] == list(range(32))
    sigma = torch.linalg.svdvals(weight)
    for d in directions:
        assert d.sigma == pytest.approx(sigma[d.index].item(), rel=1e-5)
        assert d.relative == pytest.approx((sigma[d.index] / sigma[0]).item(), rel=1e-5)
        torch.testing.assert_close(weight @ d.v.double(), d.sigma * d.u.double(), atol=1e-6, rtol=0)
    leading = list(directions_of(model, [NAME], 3, "even", rank=9))
    assert [(d.index, d.rank) for d in leading] == [(0, 9), (4, 9), (8, 9)]


def test_in_the_activation_basis_zeroing_silences_the_answer_to_one_of_the_leading_inputs():
    model = nn.ModuleDict({"a": nn.Linear(16, 12, bias=False)})
    moment = SecondMoment(16)
    moment.add(torch.randn(200, 16) * torch.linspace(3, 0.1, 16))
    weight, bases = model["a"].weight.detach(), {"a": moment.eigen()}
    leading = bases["a"].vectors[:, :4]
    for d in directions_of(model, ["a"], 4, rank=4, bases=bases):
        torch.testing.assert_close(leading @ (leading.T @ d.v), d.v, atol=1e-5, rtol=0)
        torch.testing.assert_close(weight @ d.v, d.sigma * d.u, atol=1e-5, rtol=0)
        with intervened(model, d, -1.0):
            assert model["a"](d.v).norm() < 1e-5


def test_modules_are_chosen_as_an_adapters_and_by_layer():
    model = tiny_llama()
    assert find_modules(model, ["q_proj"], [1]) == ["model.layers.1.self_attn.q_proj"]
    assert len(find_modules(model)) == 8  # the attention projections of two layers
    with pytest.raises(ConfigError, match="layer 9 has none of the requested modules; they are in layers 0, 1"):
        find_modules(model, ["q_proj"], [0, 9])


def planted(important=2, size=6):
    """A layer with a known spectrum, and a score that only one of its directions gives."""
    U, V = (torch.linalg.qr(torch.randn(size, size)).Q for _ in range(2))
    sigma = torch.arange(size, 0, -1.0)
    model = nn.ModuleDict({"a": nn.Linear(size, size, bias=False)})
    model["a"].weight = nn.Parameter(U @ sigma.diag() @ V.T)

    def measure(model):
        gain = U[:, important] @ model["a"](V[:, important])
        return {"score": 100 * (1 - gain / sigma[important]).item()}

    return model, measure


def test_the_direction_that_matters_is_found_with_what_it_is_worth():
    model, measure = planted()
    rows = probe(model, directions_of(model, ["a"], 6), ["zero", "flip", "noise_0.1"], measure)
    for row in rows:
        expected = -100 * row["factor"] if row["index"] == 2 else 0.0
        assert row["drop"]["score"] == pytest.approx(expected, abs=1e-3), row


def test_noise_depends_on_seed_direction_and_draw_and_scales_and_a_drop_that_is_not_finite_is_none():
    model, _ = planted()

    def factors(kind, seed=0):
        directions = directions_of(model, ["a"], 6)
        rows = probe(model, directions, [kind], lambda _: {"score": float("nan")}, draws=3, seed=seed)
        assert {row["drop"]["score"] for row in rows} == {None}
        return torch.tensor([row["factor"] for row in rows])

    small = factors("noise_0.1")
    assert len(small.unique()) == 18
    torch.testing.assert_close(factors("noise_0.1"), small)
    torch.testing.assert_close(factors("noise_0.2"), 2 * small)
    assert not torch.allclose(factors("noise_0.1", seed=1), small)
