"""Each rule against a dense reference or PEFT's own function, and the cases that the papers define."""

import hashlib
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils

from hiplora.adapters import Channels
from hiplora.cli.merge import rule_options
from hiplora.errors import ConfigError
from hiplora.merging.rules import DenseTerm, Term, addition, dare, find_rule, iso_c, knots, magnitude, ties, tsv
from tests import reference
from tests.unit.merging.terms import K, M, dense, expected_sum, hip_term, lora_term, make, matrices, weights

few = settings(max_examples=30, deadline=None, derandomize=True, database=None)
kinds = st.sampled_from(["shared", "elsewhere", "proj", "lora"])
numbers = st.floats(-2, 2).filter(lambda value: abs(value) > 0.1)
several = st.lists(st.tuples(kinds, st.integers(0, 20), numbers), min_size=1, max_size=4, unique_by=lambda s: s[1])


def updates(count, seed=0, shape=(11, 13)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def dense_terms(parts, factors=None, keys="abcd"):
    """Fresh terms: a dense rule overwrites them."""
    factors = factors or [1.0] * len(parts)
    return [DenseTerm(part.clone(), weight, key) for part, weight, key in zip(parts, factors, keys, strict=False)]


def close(found, expected, tolerance=1e-4):
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


def test_gains_add_in_a_shared_basis_and_not_in_another_or_a_rotated_one():
    one, other = hip_term(1, 2.0), hip_term(2, -0.5)
    factors, channels = addition([one, other])
    assert factors[0].shape[0] == 2 + 3 + K
    torch.testing.assert_close(channels.delta, 2.0 * one.channels.delta - 0.5 * other.channels.delta)
    assert channels.leak() < 1e-5
    assert addition([one, hip_term(2, basis_seed=1)])[1] is None
    turn, parts = torch.linalg.qr(torch.randn(K, K)).Q, other.channels
    rotated = Channels(parts.A, parts.B, parts.U @ turn, parts.sigma, parts.V @ turn, parts.delta, 1.5, 1e-4)
    terms = [one, Term(rotated.factors(), 1.0, rotated)]
    close(dense(addition(terms)[0]), expected_sum(terms), 1e-5)


@few
@given(several, st.sampled_from([0.2, 0.6, 1.0]))
def test_knots_in_factor_space_is_knots_on_dense_updates(specs, density):
    terms = [make(*spec) for spec in specs]
    factors, channels = knots(terms, density=density, scale=0.5)
    close(dense(factors), reference.knots(matrices(terms), weights(terms), density, 0.5))
    assert channels is None


@few
@given(several, st.sampled_from([None, 0.3, 1.0]))
def test_tsv_in_factor_space_is_tsv_on_dense_updates(specs, share):
    terms = [make(*spec) for spec in specs]
    ranks = [len(reference.nonzero_svd(update)[1]) for update in matrices(terms)]
    counts = [max(1, M // len(terms)) if share is None else math.ceil(share * rank) for rank in ranks]
    close(dense(tsv(terms, sv_reduction=share)[0]), reference.tsv(matrices(terms), weights(terms), counts), 1e-3)


@few
@given(several)
def test_iso_c_in_factor_space_is_iso_c_on_dense_updates(specs):
    terms = [make(*spec) for spec in specs]
    sigma = reference.nonzero_svd(expected_sum(terms))[1]
    assume(sigma[-1] > 1e-3 * sigma[0])  # else rounding decides which directions there are
    close(dense(iso_c(terms)[0]), reference.iso_c(matrices(terms), weights(terms)))


@pytest.mark.parametrize("rule", [knots, tsv, iso_c])
def test_a_zero_update_stays_zero(rule):
    A, B = lora_term(1).factors
    assert dense(rule([Term((A, torch.zeros_like(B)))])[0]).abs().max() == 0


def test_knots_has_the_rank_of_all_outputs_at_most_and_tsv_keeps_thin_updates_whole():
    assert knots([hip_term(1, rank=1), hip_term(4, rank=1)])[0][0].shape[0] == 3 + 1 + 1
    assert tsv([lora_term(seed, m=40, n=60, rank=4) for seed in (1, 2)])[0][0].shape[0] == 8
    term = lora_term(1, m=40, n=60, rank=3)
    close(dense(tsv([term, term])[0]), dense(term.factors), 1e-5)


@few
@given(st.integers(1, 4), st.integers(0, 1000), st.sampled_from([0.05, 0.2, 0.7, 0.999]), st.data())
def test_ties_and_magnitude_are_what_peft_computes(count, seed, density, data):
    factors = data.draw(st.lists(st.floats(-2, 2), min_size=count, max_size=count))
    parts = updates(count, seed)
    expected = merge_utils.ties(parts, torch.tensor(factors), density)
    close(ties(dense_terms(parts, factors), density=density), expected, 1e-5)
    expected = merge_utils.magnitude_prune(parts, torch.tensor(factors), density)
    close(magnitude(dense_terms(parts, factors), density=density), expected, 1e-5)


def test_entries_of_just_the_last_magnitude_all_stay():
    assert magnitude(dense_terms([torch.tensor([[3.0, -2.0, 2.0, 1.0]])]), density=0.5).tolist() == [[3, -2, 2, 0]]
    assert magnitude(dense_terms([torch.ones(2, 2)]), density=0.2).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("rescale", [True, False])
def test_dare_prunes_each_update_as_peft_does_by_seed_and_key(rescale):
    parts, factors = updates(3, shape=(20, 30)), [1.0, -0.5, 2.0]
    expected = torch.zeros(20, 30)
    before = torch.random.get_rng_state()
    for part, weight, key in zip(parts, factors, "abc", strict=True):
        digest = hashlib.blake2b(f"7 {key}".encode(), digest_size=7).digest()
        torch.manual_seed(int.from_bytes(digest))
        expected += weight * merge_utils.prune(part, 0.3, method="random", rescale=rescale)
    torch.random.set_rng_state(before)
    close(dare(dense_terms(parts, factors), density=0.3, rescale=rescale, seed=7), expected, 1e-5)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "given", "why"),
    [
        ("ties", {"density": 0}, r"density is 0; expected a number above 0 and up to 1"),
        ("tsv", {"sv_reduction": 1.5}, "sv_reduction is 1.5"),
        ("iso-c", {"scale": float("nan")}, "scale is nan; expected a finite number"),
        ("dare", {"rescale": 1}, "rescale is 1; expected true or false"),
        ("dare", {"seed": -1}, "seed is -1; expected a whole number of 0 or more"),
        ("ties", {"seed": 1}, "'ties' has no option 'seed'; its options: density, scale"),
        ("addition", {"density": 1}, "'addition' has no option 'density'; its options: none"),
    ],
)
def test_an_option_out_of_range_or_unknown_is_refused(name, given, why):
    with pytest.raises(ConfigError, match=why):
        find_rule(name).options(given)


def test_an_option_is_read_from_text():
    given = ["density=0.3", " seed = 7 ", "rescale=false", "x=none", "scale=much"]
    assert rule_options(given) == {"density": 0.3, "seed": 7, "rescale": False, "x": None, "scale": "much"}


def test_the_rules_are_listed_without_torch():
    code = (
        "import sys; from hiplora.merging import RULES\n"
        "assert [rule.options() for rule in RULES.values()]\n"
        "assert not {'torch', 'peft', 'numpy'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
