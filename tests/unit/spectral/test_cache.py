import os
import warnings
from concurrent.futures import ThreadPoolExecutor

import filelock
import pytest
import torch

from hiplora.errors import StoreError
from hiplora.spectral import FactorStore, cache, truncated_svd, weight_fingerprint
from tests.unit.spectral.matrices import gaussian


@pytest.fixture(autouse=True)
def _no_unexpected_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def counted(monkeypatch):
    """Names of the layers that were really decomposed."""
    names = []

    def counting(weight, *args, name, **kwargs):
        names.append(name)
        return truncated_svd(weight, *args, name=name, **kwargs)

    monkeypatch.setattr(cache, "truncated_svd", counting)
    return names


def equal(one, other):
    record = ("residual", "orthogonality", "method", "basis", "fingerprint")
    return all(torch.equal(getattr(one, key), getattr(other, key)) for key in ("U", "sigma", "V")) and all(
        getattr(one, key) == getattr(other, key) for key in record
    )


def entry(root):
    (path,) = root.rglob("*.safetensors")
    return path


@pytest.mark.parametrize(
    "changes", [{"k": 3}, {"tol": 1e-3}, {"weight": gaussian(30, 20, seed=1)}, {"weight": gaussian(30, 20).bfloat16()}]
)
def test_another_weight_or_other_options_have_entries_of_their_own(tmp_path, counted, changes):
    FactorStore(tmp_path).get_or_compute(gaussian(30, 20), 4)
    arguments = {"weight": gaussian(30, 20), "k": 4, **changes}
    assert equal(FactorStore(tmp_path).get_or_compute(**arguments), truncated_svd(**arguments))
    assert len(counted) == 2
    rounded = arguments["weight"].bfloat16()
    FactorStore(tmp_path).get_or_compute(rounded, 2)
    FactorStore(tmp_path).get_or_compute(rounded.float(), 2)  # equal values in another precision share one
    assert len(counted) == 3


def test_a_flipped_byte_anywhere_in_an_entry_is_noticed_or_harmless(tmp_path, counted):
    """Harmless are only bytes that mean nothing, such as the padding of the header."""
    weight = gaussian(5, 4)
    first = FactorStore(tmp_path).get_or_compute(weight, 2)
    whole = entry(tmp_path).read_bytes()
    noticed = 0
    positions = range(0, len(whole), 7)
    for position in positions:
        entry(tmp_path).write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert equal(FactorStore(tmp_path).get_or_compute(weight, 2), first)
        noticed += bool(said)
    assert noticed > 0.9 * len(positions)
    assert len(counted) == noticed + 1


def test_what_cannot_be_written_or_locked_is_an_error_with_the_way_out_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        FactorStore(tmp_path / "file").get_or_compute(gaussian(30, 20), 4)
    store, weight = FactorStore(tmp_path), gaussian(30, 20)
    path = store.factor_path(weight_fingerprint(weight), 4)
    with monkeypatch.context() as patch, pytest.raises(StoreError, match=r"cannot write .*No space.*HIPLORA_CACHE"):
        patch.setattr(os, "replace", full)
        store.get_or_compute(weight, 4)
    assert [file.name for file in path.parent.iterdir()] == [".lock"]
    monkeypatch.setattr(cache, "_LOCK_SECONDS", 0.05)
    with filelock.FileLock(path.parent / ".lock"), pytest.raises(StoreError, match="cannot write"):
        store.get_or_compute(weight, 4)
    (path.parent / f".{path.name}.abc123.part").write_bytes(b"half")  # left behind by a killed process
    store.get_or_compute(weight, 4)
    assert sorted(file.name for file in path.parent.iterdir()) == [".lock", path.name]


def test_threads_of_one_process_compute_an_entry_once(tmp_path, counted):
    weight = gaussian(60, 50)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: FactorStore(tmp_path).get_or_compute(weight, 8), range(4)))
    assert len(counted) == 1
    assert all(equal(result, results[0]) for result in results)
