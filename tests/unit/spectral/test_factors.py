"""Fingerprints, the precision that everything is computed in, and ranks in each of the ways of asking for them."""

import hashlib
import struct

import pytest
import torch

from hiplora.errors import FactorError
from hiplora.spectral import (
    factors,
    is_rank,
    parse_rank,
    resolve_rank,
    squared_singular_values,
    truncated_svd,
    weight_fingerprint,
    weight_sample,
)
from tests.unit.spectral.matrices import gaussian


def test_the_fingerprint_is_the_sha256_of_shape_and_little_endian_float32_values():
    expected = hashlib.sha256(b"(2, 3)" + struct.pack("<6f", 1, 2, 3, 4, 5, 6)).hexdigest()
    assert weight_fingerprint(torch.tensor([[1.0, 2, 3], [4, 5, 6]])) == expected


def test_only_shape_and_values_count_each_to_the_bit(monkeypatch):
    weight = gaussian(40, 30)
    whole, rounded = weight_fingerprint(weight), weight.bfloat16()
    assert weight_fingerprint(weight.T.contiguous().T) == whole
    assert weight_fingerprint(torch.nn.Parameter(weight)) == whole
    assert weight_fingerprint(rounded) == weight_fingerprint(rounded.float()) != whole
    for elements in (1, 31, 200):
        monkeypatch.setattr(factors, "_CHUNK_ELEMENTS", elements)
        assert weight_fingerprint(weight) == whole
    for position in (0, 601, 1199):
        other = weight.clone()
        other.view(torch.int32).view(-1)[position] ^= 1
        assert weight_fingerprint(other) != whole


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (30, 30), (3, 50)])
def test_a_sample_has_values_of_every_row_and_column_and_all_of_a_small_weight(shape, monkeypatch):
    weight = gaussian(*shape)
    for position in range(weight.numel()):
        other = weight.clone()
        other.view(-1)[position] += 1e-3
        assert weight_sample(other) != weight_sample(weight)
    monkeypatch.setattr(factors, "_SAMPLED", 1)
    whole = weight_sample(weight)
    assert weight_sample(weight.T.contiguous().T) == whole
    assert weight_sample(weight.bfloat16()) == weight_sample(weight.bfloat16().float()) != whole
    for line in [*weight.clone().split(1), *weight.clone().split(1, dim=1)]:
        other = weight.clone()
        other[torch.isin(weight, line)] += 1e-3
        assert weight_sample(other) != whole
    assert weight_sample(weight.reshape(-1, 2)) != whole


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (7,), (2, 3, 4)])
def test_tensors_of_any_shape_have_a_fingerprint_of_their_own(shape):
    assert len({weight_fingerprint(torch.ones(shape)), weight_fingerprint(torch.ones(1, *shape))}) == 2


def test_factors_move_between_devices_with_their_certificate():
    found = truncated_svd(gaussian(12, 9), 3)
    moved = found.to("meta")
    assert all(tensor.is_meta for tensor in (moved.U, moved.sigma, moved.V))
    assert (moved.residual, moved.fingerprint, moved.rank) == (found.residual, found.fingerprint, 3)


@pytest.mark.parametrize(
    ("spec", "shape", "k"),
    [
        (3, (4, 9), 3),
        (50, (4, 9), 50),
        (0.5, (4, 9), 2),
        (0.01, (4, 9), 1),
        (0.9, (2, 9), 2),
        ("energy:0.6", (8, 9), 1),
        ("energy:0.61", (8, 9), 2),
        ("energy:0.9", (8, 9), 3),
        ("energy:0.99", (4, 9), 2),  # half of them, so that a complement is left
        ("energy:0.99", (1, 9), 1),
    ],
)
def test_a_rank_by_hand(spec, shape, k):
    spectrum = torch.tensor([6.0, 2.0, 1.0, 1.0])
    assert resolve_rank(spec, shape, (lambda: spectrum) if isinstance(spec, str) else pytest.fail) == k
    assert resolve_rank("energy:0.9", shape, lambda: torch.zeros(4)) == 1


def test_what_is_a_rank_and_what_is_none():
    assert all(map(is_rank, [1, 0.5, "energy:0.95"]))
    assert not any(map(is_rank, [0, -1, True, 0.0, 1.0, float("nan"), "energy:0", "energy:1", "32", "", None]))
    assert [parse_rank(text) for text in ("32", "0.25", "energy:0.9", "x")] == [32, 0.25, "energy:0.9", "x"]


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_the_energies_of_a_weight_are_its_squared_singular_values(shape):
    weight = torch.randn(shape)
    torch.testing.assert_close(squared_singular_values(weight), torch.linalg.svdvals(weight.double()).square())
    weight[0, 0] = torch.nan
    with pytest.raises(FactorError, match=r"layer q_proj: the weight has NaN"):
        squared_singular_values(weight, "q_proj")
