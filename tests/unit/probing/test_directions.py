import numpy as np
import pytest
import torch
from torch import nn

from hiplora.errors import ConfigError, FactorError
from hiplora.probing import CHOICES, choose_directions, directions_of, find_modules, intervened
from hiplora.spectral import SecondMoment
from tiny import tiny_llama

DECAYING = [2.0**-i for i in range(40)]


@pytest.mark.parametrize("how", CHOICES)
@pytest.mark.parametrize(("count", "size"), [(1, 1), (1, 40), (7, 40), (39, 40), (40, 40)])
def test_so_many_different_indices_come_in_order(how, count, size):
    chosen = choose_directions(DECAYING[:size], count, how)
    assert len(set(chosen)) == count
    assert chosen == sorted(chosen)
    assert min(chosen) >= 0
    assert max(chosen) < size


def test_log_places_are_dense_among_the_strong_and_even_ones_are_not():
    spectrum = [1.0] * 1001
    assert choose_directions(spectrum, 4, "log") == [0, 9, 99, 1000]
    assert choose_directions(spectrum, 5, "even") == [0, 250, 500, 750, 1000]


def test_energy_places_have_equal_shares_of_the_energy_around_them():
    spectrum = np.sqrt(np.linspace(10, 1, 500))
    energy = np.cumsum(spectrum**2) / np.sum(spectrum**2)
    chosen = choose_directions(spectrum.tolist(), 4, "energy")
    np.testing.assert_allclose(energy[chosen], [0.125, 0.375, 0.625, 0.875], atol=0.005)


def test_random_places_hang_on_the_seed_alone():
    assert choose_directions(DECAYING, 8, "random", 1) == choose_directions(DECAYING, 8, "random", 1)
    assert choose_directions(DECAYING, 8, "random", 1) != choose_directions(DECAYING, 8, "random", 2)


@pytest.mark.parametrize(
    ("spectrum", "count", "how", "said"),
    [
        ([1.0], 1, "best", "expected one of log, even, energy, random"),
        ([1.0], 2, "log", "2 directions of 1: expected 1 to 1"),
        ([1.0], 0, "log", "0 directions of 1"),
        ([0.0, 0.0], 1, "energy", "all singular values are 0"),
    ],
)
def test_what_cannot_be_chosen_is_refused(spectrum, count, how, said):
    with pytest.raises(ConfigError, match=said):
        choose_directions(spectrum, count, how)


def test_directions_are_the_exact_singular_triplets_to_the_last():
    model = tiny_llama()
    name = "model.layers.0.self_attn.v_proj"
    weight = model.get_submodule(name).weight.detach().double()
    found = list(directions_of(model, [name], 32))
    assert [d.index for d in found] == list(range(32))
    sigma = torch.linalg.svdvals(weight)
    for d in found:
        assert d.sigma == pytest.approx(sigma[d.index].item(), rel=1e-5)
        assert d.relative == pytest.approx((sigma[d.index] / sigma[0]).item(), rel=1e-5)
        torch.testing.assert_close(weight @ d.v.double(), d.sigma * d.u.double(), atol=1e-6, rtol=0)
        assert (d.module, d.layer, d.type, d.rank) == (name, 0, "v_proj", 32)


def test_random_places_differ_between_modules():
    modules = find_modules(tiny_llama(), ["q_proj"])
    found = list(directions_of(tiny_llama(), modules, 10, "random"))
    places = {name: [d.index for d in found if d.module == name] for name in modules}
    assert places[modules[0]] != places[modules[1]]


def test_the_choice_can_be_among_the_leading_directions_only():
    name = "model.layers.0.self_attn.v_proj"
    found = list(directions_of(tiny_llama(), [name], 3, "even", rank=9))
    assert [(d.index, d.rank) for d in found] == [(0, 9), (4, 9), (8, 9)]
    assert next(directions_of(tiny_llama(), [name], 1, rank=1000)).rank == 32
    with pytest.raises(ConfigError, match="rank is 0"):
        list(directions_of(tiny_llama(), [name], 1, rank=0))


def test_in_the_activation_basis_zeroing_silences_the_answer_to_one_of_the_leading_inputs():
    model = nn.ModuleDict({"a": nn.Linear(16, 12, bias=False)})
    moment = SecondMoment(16)
    moment.add(torch.randn(200, 16) * torch.linspace(3, 0.1, 16))
    weight, bases = model["a"].weight.detach(), {"a": moment.eigen()}
    found = list(directions_of(model, ["a"], 4, rank=4, bases=bases))
    leading = bases["a"].vectors[:, :4]
    for d in found:
        torch.testing.assert_close(weight @ d.v, d.sigma * d.u, atol=1e-5, rtol=0)
        torch.testing.assert_close(leading @ (leading.T @ d.v), d.v, atol=1e-5, rtol=0)
        with intervened(model, d, -1.0):
            torch.testing.assert_close(model["a"](d.v), torch.zeros(12), atol=1e-5, rtol=0)
    assert [d.rank for d in directions_of(model, ["a"], 2, bases=bases)] == [12, 12]  # 32 at most


def test_too_many_directions_and_a_broken_weight_name_the_layer():
    name = "model.layers.0.self_attn.v_proj"
    with pytest.raises(ConfigError, match=rf"{name}: 33 directions of 32"):
        list(directions_of(tiny_llama(), [name], 33))
    model = tiny_llama()
    with torch.no_grad():
        model.get_submodule(name).weight[0, 0] = float("nan")
    with pytest.raises(FactorError, match=name):
        list(directions_of(model, [name], 1))


def test_modules_are_found_by_name_and_layer():
    model = tiny_llama()
    assert find_modules(model, ["q_proj", "v_proj"], [1]) == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    assert len(find_modules(model)) == 8
    assert {name.split(".")[2] for name in find_modules(model, "all-linear", [0])} == {"0"}
    with pytest.raises(ConfigError, match=r"layer 7 has none of the modules asked for; they are in 0, 1"):
        find_modules(model, ["q_proj"], [1, 7])
    with pytest.raises(ConfigError, match="nothing_proj"):
        find_modules(model, ["nothing_proj"])
