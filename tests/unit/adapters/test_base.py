import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from hiplora.adapters import BaseWeights, base
from hiplora.adapters.base import in_precision
from hiplora.errors import AdapterError
from hiplora.spectral import weight_fingerprint
from tests.tiny import save_tiny
from tests.unit.adapters.samples import base_model, save_tiny_gpt2


@pytest.mark.parametrize("kind", ["tied", "bf16", "gpt2"])
def test_every_weight_is_read_as_stored_and_transposed_ones_as_out_by_in(tmp_path, kind):
    if kind == "gpt2":
        save_tiny_gpt2(tmp_path)
    else:
        save_tiny(tmp_path, tie=kind == "tied", dtype=torch.bfloat16 if kind == "bf16" else torch.float32)
    weights = BaseWeights(str(tmp_path))
    for name, layer in base_model(tmp_path, dtype="auto").named_modules():
        if type(layer).__name__ in ("Linear", "Conv1D"):
            stored = layer.weight.T if type(layer).__name__ == "Conv1D" else layer.weight
            assert torch.equal(weights.weight(name), stored)


def test_a_model_that_cannot_be_read_is_named_with_the_way_out(tiny_model_dir, tmp_path):
    with pytest.raises(AdapterError, match=r"has no linear layer model\.norm.*--base"):
        BaseWeights(str(tiny_model_dir)).weight("model.norm")
    with pytest.raises(AdapterError, match=r"nowhere.*--base"):
        BaseWeights(str(tmp_path / "nowhere"))
    broken = shutil.copytree(tiny_model_dir, tmp_path / "broken")
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(AdapterError, match=r"broken: cannot be read"):
        BaseWeights(str(broken)).weight("lm_head")
    (broken / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    with pytest.raises(AdapterError, match=r"broken: cannot be read"):
        BaseWeights(str(broken))


@pytest.mark.parametrize(
    ("free", "unasked", "device", "way_out"),
    [
        (10**9, 10**9, "auto", ""),
        (10**9, 1000, "auto", "no GPU; pass --device cpu"),
        (10**9, 1000, "cpu", ""),
        (1000, 10**9, "auto", "more than is free; use a machine with more memory"),
    ],
)
def test_what_is_too_large_to_measure_is_not_loaded_unasked(
    tiny_model_dir, monkeypatch, free, unasked, device, way_out
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(base.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    monkeypatch.setattr(base, "_LARGE_FOR_CPU", unasked)
    weights = BaseWeights(str(tiny_model_dir))
    if not way_out:
        assert weights.load(device).dtype == torch.float32
        return
    with pytest.raises(AdapterError, match=f"needs .* GiB.*{way_out}"):
        weights.load(device)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_weight_is_recognised_in_the_precision_that_the_adapter_saw(half):
    weight = torch.randn(8, 6)
    rounded = weight.to(half)
    assert torch.equal(in_precision(weight, weight_fingerprint(weight)), weight)
    assert torch.equal(in_precision(rounded, weight_fingerprint(rounded.float())), rounded)
    assert torch.equal(in_precision(weight, weight_fingerprint(rounded)), rounded)
    assert in_precision(rounded, weight_fingerprint(weight)) is None
    assert in_precision(weight, weight_fingerprint(weight + 1)) is None
