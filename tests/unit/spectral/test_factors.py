import hashlib
import struct

import pytest
import torch

from hiplora.spectral import factors as module
from hiplora.spectral import truncated_svd, weight_fingerprint
from tests.unit.spectral.matrices import gaussian


def test_the_fingerprint_is_the_sha256_of_shape_and_little_endian_float32_values():
    expected = hashlib.sha256(b"(2, 3)" + struct.pack("<6f", 1, 2, 3, 4, 5, 6)).hexdigest()
    assert weight_fingerprint(torch.tensor([[1.0, 2, 3], [4, 5, 6]])) == expected


def test_only_shape_and_values_count(monkeypatch):
    weight = gaussian(40, 30)
    whole, rounded = weight_fingerprint(weight), weight.bfloat16()
    assert weight_fingerprint(weight.T.contiguous().T) == whole
    assert weight_fingerprint(torch.nn.Parameter(weight)) == whole
    assert weight_fingerprint(rounded) == weight_fingerprint(rounded.float()) != whole
    for elements in (1, 31, 200):
        monkeypatch.setattr(module, "_CHUNK_ELEMENTS", elements)
        assert weight_fingerprint(weight) == whole


def test_one_flipped_bit_anywhere_changes_the_fingerprint():
    weight = gaussian(40, 30)
    seen = {weight_fingerprint(weight)}
    for position in (0, 601, 1199):
        other = weight.clone()
        other.view(torch.int32).view(-1)[position] ^= 1
        seen.add(weight_fingerprint(other))
    assert len(seen) == 4


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (7,), (2, 3, 4)])
def test_tensors_of_any_shape_have_a_fingerprint_of_their_own(shape):
    fingerprint = weight_fingerprint(torch.ones(shape))
    assert len(fingerprint) == 64
    assert fingerprint != weight_fingerprint(torch.ones(1, *shape))


def test_factors_move_between_devices_with_their_certificate():
    factors = truncated_svd(gaussian(12, 9), 3)
    moved = factors.to("meta")
    assert all(tensor.is_meta for tensor in (moved.U, moved.sigma, moved.V))
    assert (moved.residual, moved.fingerprint, moved.rank) == (factors.residual, factors.fingerprint, 3)
