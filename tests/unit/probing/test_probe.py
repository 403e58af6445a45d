import json

import pytest
import torch
from torch import nn

from hiplora.errors import ConfigError, DataError
from hiplora.probing import Intervention, ProbeRecord, directions_of, find_modules, probe
from tiny import tiny_llama

ALL = [Intervention.parse(name) for name in ("zero", "flip", "noise_0.1")]


def planted(important=2, size=6):
    """A layer with a known spectrum, and a score that only one of its directions gives."""
    U, V = (torch.linalg.qr(torch.randn(size, size)).Q for _ in range(2))
    sigma = torch.arange(size, 0, -1.0)
    model = nn.ModuleDict({"a": nn.Linear(size, size, bias=False)})
    model["a"].weight = nn.Parameter(U @ sigma.diag() @ V.T)

    def measure(model):
        gain = U[:, important] @ model["a"](V[:, important])
        return {"score": 100 * (gain / sigma[important]).item(), "kl": 0.0}

    return model, measure


class Counting:
    def __init__(self, fail_at=None):
        self.calls, self.fail_at = 0, fail_at

    @torch.no_grad()
    def __call__(self, model):
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        return {"score": float(model(input_ids=torch.arange(1, 9)[None]).logits.square().mean())}


def test_the_direction_that_matters_is_found_with_what_it_is_worth():
    model, measure = planted()
    records = probe(model, directions_of(model, ["a"], 6), ALL[:2], measure)
    drops = {(record.index, record.kind): record.drop["score"] for record in records}
    for (index, kind), drop in drops.items():
        expected = {"zero": 100.0, "flip": 200.0}[kind] if index == 2 else 0.0
        assert drop == pytest.approx(expected, abs=1e-3), (index, kind)


def test_a_record_says_which_direction_of_which_module_it_is_of():
    model = tiny_llama()
    modules = find_modules(model, ["k_proj"], [1])
    *_, last = probe(model, directions_of(model, modules, 2), ALL[:1], Counting())
    weight = model.get_submodule(modules[0]).weight
    sigma = torch.linalg.svdvals(weight)
    assert (last.module, last.layer, last.type) == (modules[0], 1, "k_proj")
    assert (last.index, last.rank, last.kind, last.draw, last.factor) == (31, 32, "zero", 0, -1.0)
    assert last.sigma == pytest.approx(sigma[31].item(), rel=1e-4)
    assert last.relative == pytest.approx((sigma[31] / sigma[0]).item(), rel=1e-4)
    assert ProbeRecord(**json.loads(json.dumps(last.as_dict()))) == last


def test_where_less_is_better_a_rise_is_the_drop():
    model, measure = planted()
    records = probe(model, directions_of(model, ["a"], 6), ALL[:1], measure, lower_is_better=("score",))
    assert records[2].drop["score"] == pytest.approx(-100.0, abs=1e-3)


def test_the_model_is_left_as_it_was():
    model = tiny_llama()
    before = {name: (weight, weight.detach().clone()) for name, weight in model.named_parameters()}
    with pytest.raises(KeyboardInterrupt):
        probe(model, directions_of(model, find_modules(model, ["q_proj"]), 3), ALL, Counting(fail_at=6))
    for name, weight in model.named_parameters():
        assert weight is before[name][0]
        assert torch.equal(weight, before[name][1])


def test_what_is_done_is_not_measured_again_and_the_result_is_the_same():
    model = tiny_llama()
    modules = find_modules(model, ["q_proj"])

    def run(measure, done=(), on_record=None):
        directions = directions_of(model, modules, 3)
        return probe(model, directions, ALL, measure, draws=2, done=done, on_record=on_record)

    whole, kept = run(Counting()), []
    with pytest.raises(KeyboardInterrupt):
        run(Counting(fail_at=8), on_record=kept.append)
    assert len(kept) == 6  # one call is the base's, one failed
    rest = Counting()
    assert run(rest, done=kept) == whole
    assert rest.calls == 1 + len(whole) - len(kept)


def test_known_base_scores_are_taken():
    model, measure = planted()
    calls = []

    def counted(model):
        calls.append(1)
        return measure(model)

    (record,) = probe(
        model, directions_of(model, ["a"], 1), ALL[:1], counted, base={"score": 150.0, "kl": 0.0}
    )
    assert len(calls) == 1
    assert record.drop["score"] == pytest.approx(50.0, abs=1e-3)


def test_noise_hangs_on_seed_direction_and_draw_and_scales():
    model, measure = planted()

    def factors(scale, seed=0):
        noise = [Intervention("noise", scale)]
        records = probe(model, directions_of(model, ["a"], 6), noise, measure, draws=3, seed=seed)
        return torch.tensor([record.factor for record in records])

    small = factors(0.1)
    assert len(small.unique()) == 18
    torch.testing.assert_close(factors(0.1), small)
    torch.testing.assert_close(factors(0.2), 2 * small)
    assert not torch.allclose(factors(0.1, seed=1), small)
    assert small.abs().max() < 0.5  # of N(0, 0.1²)


def test_noise_costs_its_multiple_of_what_zero_costs_in_a_linear_score():
    model, measure = planted()
    (record,) = (
        row for row in probe(model, directions_of(model, ["a"], 6), ALL[2:], measure) if row.index == 2
    )
    assert record.drop["score"] == pytest.approx(-100 * record.factor, abs=1e-3)


def test_a_loss_without_a_finite_number_is_kept_as_none():
    model, _ = planted()
    scores = iter([50.0, float("nan"), float("inf"), 40.0])
    records = probe(model, directions_of(model, ["a"], 3), ALL[:1], lambda _: {"score": next(scores)})
    assert [record.drop["score"] for record in records] == [None, None, 10.0]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"interventions": [*ALL, ALL[0]]}, ConfigError, "zero: is there twice"),
        ({"draws": 0}, ConfigError, "draws is 0"),
        ({"lower_is_better": ("perplexity",)}, ConfigError, "names perplexity, which is not measured"),
        ({"base": {"score": float("nan")}}, DataError, "score of the base model is nan"),
        ({"base": {"other": 1.0}}, DataError, "direction 0, zero: measured kl, score; expected"),
    ],
)
def test_what_makes_no_sense_is_refused(options, error, said):
    model, measure = planted()
    with pytest.raises(error, match=said):
        probe(model, directions_of(model, ["a"], 1), **({"interventions": ALL, "measure": measure} | options))
