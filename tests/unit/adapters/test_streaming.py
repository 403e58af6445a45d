import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hiplora.adapters import AdapterUpdate, read_update, save_dense, shards
from hiplora.errors import AdapterError
from tests.tiny import save_tiny
from tests.unit.adapters.samples import base_model, hip_config, logits, product, save_tiny_gpt2, saved


@dataclass
class DenseSum:
    """Several adapters added up as matrices: an update that knows no factors."""

    updates: list
    asked: list
    kind: str = "merged"
    source: str = "a sum"

    def __getattr__(self, name):
        if name in ("base", "config", "extras", "fingerprints", "modules", "shape", "check_leak"):
            return getattr(self.updates[0], name)
        raise AttributeError(name)

    def delta(self, module):
        self.asked.append(module)
        return sum(product(update, module) for update in self.updates)


def without_safetensors(folder):
    """The same checkpoint in the pickled format of older models."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def tensors_of(folder):
    return {
        name: tensor
        for file in Path(folder).glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def assert_same_tensors(one, other):
    one, other = tensors_of(one), tensors_of(other)
    assert set(one) == set(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name


CASES = {
    "untied": (save_tiny, {}, {}),
    "tied": (lambda path: save_tiny(path, tie=True), {}, {}),
    "tied, head adapted": (
        lambda path: save_tiny(path, tie=True),
        {"target_modules": ["q_proj", "lm_head"]},
        {},
    ),
    "tied, embeddings saved": (
        lambda path: save_tiny(path, tie=True),
        {"modules_to_save": ["embed_tokens"]},
        {},
    ),
    "head saved": (save_tiny, {"modules_to_save": ["lm_head"]}, {}),
    "bf16": (lambda path: save_tiny(path, dtype=torch.bfloat16), {}, {}),
    "to fp16": (save_tiny, {}, {"dtype": "float16"}),
    "Conv1D": (save_tiny_gpt2, {"target_modules": ["c_attn", "c_proj"]}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_streaming_writes_what_merging_the_whole_model_does(tmp_path, monkeypatch, case):
    make, changes, options = CASES[case]
    base = make(tmp_path / "base")
    folder, _ = saved(base, tmp_path / "a", hip_config(**changes))
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_BLOCK", 300)  # so that every matrix comes in several blocks of rows
        streamed = save_dense(folder, tmp_path / "streamed", **options)
    without_safetensors(base)
    whole = save_dense(folder, tmp_path / "whole", **options)
    assert (streamed.streamed, whole.streamed) == (True, False)
    assert (streamed.untied, streamed.dtype, streamed.files) == (whole.untied, whole.dtype, whole.files)
    assert "not stored as safetensors" in whole.note
    assert_same_tensors(tmp_path / "streamed", tmp_path / "whole")
    configs = [json.loads((tmp_path / side / "config.json").read_text()) for side in ("streamed", "whole")]
    assert configs[0] == configs[1]


def test_the_model_is_never_loaded(hip, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "hiplora.adapters.dense.load_base", lambda *_: pytest.fail("the whole model was loaded")
    )
    monkeypatch.setattr(
        "hiplora.adapters.base_weights.load_base", lambda *_: pytest.fail("the whole model was loaded")
    )
    assert save_dense(hip[0], tmp_path / "out", check_logits=False).streamed


def test_shards_are_read_and_written(hip, tmp_path, tiny_model_dir):
    base = tmp_path / "base"
    base_model(tiny_model_dir).save_pretrained(base, max_shard_size="50KB")
    whole = save_dense(hip[0], tmp_path / "one")
    report = save_dense(hip[0], tmp_path / "several", base=str(base), max_shard_size="70KB")
    assert whole.files == ("model.safetensors",)
    assert report.files == tuple(sorted(file.name for file in (tmp_path / "several").glob("*.safetensors")))
    assert len(report.files) > 1
    assert_same_tensors(tmp_path / "one", tmp_path / "several")
    torch.testing.assert_close(logits(base_model(tmp_path / "several")), logits(hip[1]), rtol=1e-4, atol=1e-5)


def test_shards_are_written_of_a_model_that_was_loaded_as_a_whole(hip, tmp_path, tiny_model_dir):
    base = without_safetensors(shutil.copytree(tiny_model_dir, tmp_path / "base"))
    assert len(save_dense(hip[0], tmp_path / "out", base=str(base), max_shard_size="70KB").files) > 1


def test_what_the_adapter_leaves_alone_is_kept_bit_by_bit(hip, tmp_path, tiny_model_dir):
    save_dense(hip[0], tmp_path / "out")
    before, after = tensors_of(tiny_model_dir), tensors_of(tmp_path / "out")
    adapted = {f"{module}.weight" for module in read_update(hip[0]).modules}
    assert {name for name in before if not torch.equal(before[name], after[name])} == adapted


def test_every_tensor_keeps_its_own_number_format(tmp_path):
    base = save_tiny(tmp_path / "base", dtype=torch.bfloat16)
    folder, _ = saved(base, tmp_path / "a", hip_config())
    mixed = tensors_of(base) | {"model.norm.weight": torch.full((64,), 1.0009765625)}
    save_file(mixed, base / "model.safetensors", metadata={"format": "pt"})
    report = save_dense(folder, tmp_path / "out")
    assert report.dtype == "bfloat16"
    written = tensors_of(tmp_path / "out")
    assert {name: tensor.dtype for name, tensor in written.items()} == {
        name: tensor.dtype for name, tensor in mixed.items()
    }
    assert torch.equal(written["model.norm.weight"], mixed["model.norm.weight"])


def test_updates_without_factors_are_asked_once_for_each_module(hip, tmp_path):
    update = read_update(hip[0])
    merged = DenseSum([update, update], [])
    report = save_dense(merged, tmp_path / "out")
    assert sorted(merged.asked) == sorted(update.modules)
    assert report.logits is None
    assert report.note == "logits not compared: the merged updates are not of low rank"
    assert len(report.checks) == 2
    before, after = tensors_of(update.base), tensors_of(tmp_path / "out")
    for module in update.modules:
        name = f"{module}.weight"
        torch.testing.assert_close(
            after[name] - before[name], 2 * product(update, module), rtol=1e-4, atol=1e-6
        )


def test_updates_without_factors_are_checked_against_the_base_weights(hip, tmp_path):
    other = save_tiny(tmp_path / "other", seed=1)
    with pytest.raises(AdapterError, match="is not the one"):
        save_dense(DenseSum([read_update(hip[0])], []), tmp_path / "out", base=str(other))


def test_updates_without_factors_go_into_a_model_that_is_loaded_as_a_whole(hip, tmp_path, tiny_model_dir):
    base = without_safetensors(shutil.copytree(tiny_model_dir, tmp_path / "base"))
    update = read_update(hip[0])
    report = save_dense(DenseSum([update, update], []), tmp_path / "out", base=str(base))
    assert "loaded as a whole" in report.note
    save_dense(DenseSum([update, update], []), tmp_path / "streamed")
    assert_same_tensors(tmp_path / "out", tmp_path / "streamed")


def test_files_that_name_the_weights_otherwise_are_merged_as_a_whole(tmp_path):
    base = save_tiny_gpt2(tmp_path / "gpt2")
    folder, model = saved(base, tmp_path / "a", hip_config(target_modules=["c_attn"]))
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors_of(base).items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    report = save_dense(folder, tmp_path / "out")
    assert not report.streamed
    assert "have no tensor transformer.h.0.attn.c_attn.weight" in report.note
    torch.testing.assert_close(logits(base_model(tmp_path / "out")), logits(model), rtol=1e-4, atol=1e-5)


def test_a_base_model_that_lacks_a_file_is_refused(hip, tmp_path, tiny_model_dir):
    base = tmp_path / "base"
    base_model(tiny_model_dir).save_pretrained(base, max_shard_size="50KB")
    sorted(base.glob("*.safetensors"))[-1].unlink()
    with pytest.raises(AdapterError, match="cannot be read"):
        save_dense(hip[0], tmp_path / "out", base=str(base))
    assert not (tmp_path / "out").exists()


def test_a_base_model_that_was_cut_off_is_refused(hip, tmp_path, tiny_model_dir):
    base = shutil.copytree(tiny_model_dir, tmp_path / "base")
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(AdapterError, match="damaged or cut off"):
        save_dense(hip[0], tmp_path / "out", base=str(base))


def test_a_merge_that_overflows_the_number_format_names_the_layer(hip, tmp_path, monkeypatch):
    delta = AdapterUpdate.delta
    monkeypatch.setattr(AdapterUpdate, "delta", lambda update, module: delta(update, module) + 1e5)
    with pytest.raises(
        AdapterError, match=r"layer model\.layers\..* overflows float16; pass --dtype float32"
    ):
        save_dense(hip[0], tmp_path / "out", dtype="float16")


def test_a_copied_weight_that_overflows_the_number_format_is_named(hip, tmp_path, tiny_model_dir):
    base = shutil.copytree(tiny_model_dir, tmp_path / "base")
    tensors = tensors_of(base)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1e6
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=r"tensor model\.norm\.weight overflows float16"):
        save_dense(hip[0], tmp_path / "out", base=str(base), dtype="float16")


def test_generation_settings_are_the_base_models_own(hip, tmp_path, tiny_model_dir):
    base = shutil.copytree(tiny_model_dir, tmp_path / "base")
    settings = json.dumps({"do_sample": True, "temperature": 0.3})
    (base / "generation_config.json").write_text(settings)
    save_dense(hip[0], tmp_path / "with", base=str(base))
    assert (tmp_path / "with" / "generation_config.json").read_text() == settings
    (base / "generation_config.json").unlink()
    save_dense(hip[0], tmp_path / "without", base=str(base))
    assert base_model(tmp_path / "without").generation_config.eos_token_id == 257


def test_progress_is_told_by_tensor(hip, tmp_path, tiny_model_dir):
    told = []

    def wrap(names):
        for name in names:
            told.append(name)
            yield name

    save_dense(hip[0], tmp_path / "out", wrap=wrap)
    assert sorted(told) == sorted(tensors_of(tiny_model_dir))
