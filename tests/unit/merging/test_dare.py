import pytest
import torch
from peft.utils import merge_utils

from hiplora.errors import ConfigError
from hiplora.merging.dare import Options, combine, seed_of
from hiplora.merging.term import DenseTerm
from tests.unit.merging.test_ties import updates


def merged(parts, weights=None, keys="abcd", **options):
    weights = weights or [1.0] * len(parts)
    rows = zip(parts, weights, keys, strict=False)
    return combine((DenseTerm(p.clone(), w, k) for p, w, k in rows), Options(**options))


@pytest.mark.parametrize("rescale", [True, False])
def test_each_update_is_pruned_as_peft_prunes(rescale):
    parts, weights = updates(3, shape=(20, 30)), [1.0, -0.5, 2.0]
    expected = torch.zeros(20, 30)
    for part, weight, key in zip(parts, weights, "abc", strict=True):
        torch.manual_seed(seed_of(DenseTerm(part, weight, key), 7))
        expected += weight * merge_utils.prune(part, 0.3, method="random", rescale=rescale)
    found = merged(parts, weights, density=0.3, rescale=rescale, seed=7)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_one_update_is_what_peft_makes_of_it():
    (part,) = updates(1)
    torch.manual_seed(seed_of(DenseTerm(part, 1.0, "a"), 0))
    expected = merge_utils.dare_linear([part], torch.tensor([2.0]), 0.5)
    assert torch.equal(merged([part], [2.0]), expected)


def test_the_draw_is_by_seed_and_key():
    (part,) = updates(1)
    assert torch.equal(merged([part], keys="a", seed=1), merged([part], keys="a", seed=1))
    assert not torch.equal(merged([part], keys="a", seed=1), merged([part], keys="a", seed=2))
    assert not torch.equal(merged([part], keys="a", seed=1), merged([part], keys="b", seed=1))


def test_the_blocks_of_rows_draw_apart():
    part = torch.ones(600, 4000)
    kept = merged([part], density=0.5, rescale=False)
    assert not torch.equal(kept[:262], kept[262:524])


def test_the_programs_random_state_is_left_as_it_was():
    before = torch.random.get_rng_state()
    merged(updates(2))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_on_average_it_is_the_sum_of_the_updates():
    parts, weights = updates(2, shape=(30, 40)), [1.0, -0.5]
    found = sum(merged(parts, weights, seed=seed) for seed in range(400)) / 400
    expected = parts[0] - 0.5 * parts[1]
    assert (found - expected).abs().mean() < 0.06
    assert (merged(parts, weights) - expected).abs().mean() > 0.4


def test_at_density_one_it_is_the_sum_of_the_updates():
    parts, weights = updates(3), [1.0, -0.5, 2.0]
    expected = sum(w * p for p, w in zip(parts, weights, strict=True))
    torch.testing.assert_close(merged(parts, weights, density=1.0), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"density": 0}, "density is 0; expected a number above 0"),
        ({"rescale": 1}, "rescale is 1; expected true or false"),
        ({"seed": -1}, "seed is -1; expected a whole number of 0 or more"),
        ({"seed": 1.5}, "seed is 1.5"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(given, why):
    with pytest.raises(ConfigError, match=why):
        Options(**given)
