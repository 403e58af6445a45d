import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hiplora.adapters import shards
from hiplora.adapters.shards import (
    INDEX,
    TensorSpec,
    check_file,
    read_blocks,
    read_specs,
    write_file,
    write_shards,
)
from hiplora.errors import AdapterError, ConfigError
from tests.tiny import save_tiny, tiny_llama

TENSORS = {
    "scalar": torch.tensor(3.5),
    "flags": torch.tensor([True, False, True]),
    "half": torch.randn(7, 3).half(),
    "brain": torch.randn(5, 2, 3).bfloat16(),
    "float": torch.randn(11, 4),
    "double": torch.randn(3, dtype=torch.float64),
    "count": torch.arange(9).reshape(3, 3),
    "small": torch.randn(4, 2).to(torch.float8_e4m3fn),
    "empty": torch.zeros(0, 4),
}


def specs_of(tensors):
    return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def in_blocks(tensors, rows=2):
    """A function that yields a tensor some rows at a time."""
    return lambda name: tensors[name].split(rows) if tensors[name].dim() else [tensors[name]]


def assert_equal(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(raw(found[name]), raw(tensor)), name


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_safetensors_reads_back_what_was_written_in_blocks(tmp_path):
    write_shards(tmp_path, specs_of(TENSORS), in_blocks(TENSORS))
    assert_equal(load_file(tmp_path / "model.safetensors"), TENSORS)
    assert not (tmp_path / INDEX).exists()


def test_the_file_is_the_one_that_safetensors_writes(tmp_path):
    tensors = {name: torch.randn(3, 4) for name in "abc"}
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    write_shards(tmp_path, specs_of(tensors), in_blocks(tensors))
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_wide_numbers_come_first_so_that_every_tensor_is_aligned(tmp_path):
    tensors = {"odd": torch.zeros(3, dtype=torch.uint8), "wide": torch.zeros(2, dtype=torch.float64)}
    write_shards(tmp_path, specs_of(tensors), in_blocks(tensors))
    raw = (tmp_path / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["wide"]["data_offsets"] == [0, 16]


def test_files_of_safetensors_are_read_in_blocks(tmp_path, monkeypatch):
    save_file(TENSORS, tmp_path / "file.safetensors")
    monkeypatch.setattr(shards, "_BLOCK", 4)
    specs = read_specs(tmp_path / "file.safetensors")
    assert specs == specs_of(TENSORS)
    for name, tensor in TENSORS.items():
        found = list(read_blocks(tmp_path / "file.safetensors", name))
        assert len(found) > 1 or tensor.numel() <= 4
        assert torch.equal(torch.cat([raw(block) for block in found] or [raw(tensor)]), raw(tensor))


def test_shards_and_their_index_are_those_of_transformers(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    tensors = model.state_dict()
    (tmp_path / "ours").mkdir()
    files = write_shards(tmp_path / "ours", specs_of(tensors), in_blocks(tensors), "100KB")
    assert files == sorted(file.name for file in (tmp_path / "theirs").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    ours, theirs = (json.loads((tmp_path / side / INDEX).read_text()) for side in ("ours", "theirs"))
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    assert set(ours["weight_map"]) == set(theirs["weight_map"])
    for file in files:
        tensors_there = load_file(tmp_path / "ours" / file)
        assert {ours["weight_map"][name] for name in tensors_there} == {file}
        assert sum(tensor.nbytes for tensor in tensors_there.values()) <= 100_000


def test_transformers_loads_the_shards(tmp_path):
    base, model = save_tiny(tmp_path / "m"), tiny_llama()
    (base / "model.safetensors").unlink()
    write_shards(base, specs_of(model.state_dict()), in_blocks(model.state_dict()), "50KB")
    loaded, said = AutoModelForCausalLM.from_pretrained(base, output_loading_info=True)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    assert_equal(loaded.state_dict(), model.state_dict())


def test_a_tensor_larger_than_a_shard_gets_a_file_of_its_own(tmp_path):
    tensors = {"a": torch.zeros(10), "b": torch.zeros(1000), "c": torch.zeros(10)}
    files = write_shards(tmp_path, specs_of(tensors), in_blocks(tensors), 100)
    assert {frozenset(load_file(tmp_path / file)) for file in files} == {frozenset("ac"), frozenset("b")}


def test_one_tensor_is_asked_for_at_a_time_and_progress_is_told(tmp_path):
    asked, told = [], []

    def blocks(name):
        asked.append(name)
        return in_blocks(TENSORS)(name)

    def wrap(names):
        for name in names:
            assert asked == told
            told.append(name)
            yield name
        told.append("end")

    write_shards(tmp_path, specs_of(TENSORS), blocks, 50, wrap)
    assert told == [*asked, "end"]
    assert set(asked) == set(TENSORS)


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (torch.zeros(2, 3), "got 24 bytes, expected 36"),
        (torch.zeros(3, 3).half(), "float16, expected torch.float32"),
    ],
)
def test_blocks_that_are_not_what_was_announced_are_refused(tmp_path, block, said):
    with pytest.raises(ValueError, match=f"tensor w: .*{said}"):
        write_file(tmp_path / "f.safetensors", {"w": TensorSpec((3, 3), torch.float32)}, lambda name: [block])


def test_a_file_that_changed_on_disk_is_noticed_and_the_tensor_named(tmp_path):
    path = tmp_path / "f.safetensors"
    tensors = {"first": torch.zeros(4), "second": torch.zeros(4)}
    sums = write_file(path, specs_of(tensors), in_blocks(tensors))
    check_file(path, sums)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(AdapterError, match="tensor second does not read back"):
        check_file(path, sums)


def test_every_file_is_read_back_once_it_is_written(tmp_path, monkeypatch):
    written = shards.write_file
    monkeypatch.setattr(
        shards,
        "write_file",
        lambda *arguments: {name: found + 1 for name, found in written(*arguments).items()},
    )
    with pytest.raises(AdapterError, match="does not read back"):
        write_shards(tmp_path, specs_of(TENSORS), in_blocks(TENSORS))


def test_a_file_that_was_cut_off_is_named(tmp_path):
    path = tmp_path / "f.safetensors"
    save_file({"w": torch.zeros(40)}, path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(AdapterError, match=r"f\.safetensors: damaged or cut off"):
        read_specs(path)


@pytest.mark.parametrize("size", ["5", "five GB", "-5GB", "5 GiB", "", 0, -1, 5.0])
def test_what_is_no_size_is_refused(tmp_path, size):
    with pytest.raises(ConfigError, match="max_shard_size"):
        write_shards(tmp_path, specs_of(TENSORS), in_blocks(TENSORS), size)
    assert not list(tmp_path.iterdir())
