import json

import pytest
import torch
from peft import PeftModel

from hiplora.adapters import read_update, save_as_lora, update_from_model
from hiplora.errors import AdapterError
from tests.unit.adapters.adalora_samples import adalora
from tests.unit.adapters.samples import base_model, deltas, edit_tensors, logits, product

Q0, V0 = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return adalora(tiny_model_dir)


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def assert_is_what_peft_adds(update, model):
    expected = deltas(model)
    assert set(update.factors) == set(expected)
    for module, delta in expected.items():
        torch.testing.assert_close(product(update, module), delta, rtol=1e-5, atol=1e-8)
    assert max(delta.abs().max() for delta in expected.values()) > 1e-3


def test_a_saved_adapter_is_what_peft_adds(model, folder, tiny_model_dir):
    update = read_update(folder)
    assert_is_what_peft_adds(update, model)
    assert_is_what_peft_adds(update, PeftModel.from_pretrained(base_model(tiny_model_dir), folder))
    assert update.kind == "adalora"
    assert len(set(update.ranks.values())) > 1


def test_it_is_what_peft_merges_into_the_weights(folder, tiny_model_dir):
    update, base = read_update(folder), base_model(tiny_model_dir)
    before = base.get_submodule(V0).weight.detach().clone()
    merged = PeftModel.from_pretrained(base, folder).merge_and_unload()
    change = merged.get_submodule(V0).weight - before
    torch.testing.assert_close(product(update, V0), change, rtol=1e-4, atol=1e-7)


def test_a_live_adapter_is_what_peft_adds_and_stays_as_it_is(tiny_model_dir):
    model = adalora(tiny_model_dir)  # one that was never saved: PEFT renames the pattern's keys then
    before = {name: list(kept) for name, kept in model.peft_config["default"].rank_pattern.items()}
    assert_is_what_peft_adds(update_from_model(model), model)
    assert model.peft_config["default"].rank_pattern == before


def test_an_adapter_that_was_not_pruned_is_read_too(tiny_model_dir, tmp_path):
    model = adalora(tiny_model_dir, tinit=7, tfinal=0)
    model.peft_config["default"].rank_pattern = None
    model.save_pretrained(tmp_path / "a")
    assert set(read_update(tmp_path / "a").ranks.values()) == {6}
    assert_is_what_peft_adds(read_update(tmp_path / "a"), model)


def test_a_module_without_any_rank_left_has_a_zero_update(folder):
    def empty(tensors):
        for part, shape in (("A", (0, 64)), ("B", (32, 0)), ("E", (0, 1))):
            tensors[f"{PREFIX}{V0}.lora_{part}"] = torch.zeros(shape)

    edit_tensors(folder, empty)
    pattern = json.loads((folder / "adapter_config.json").read_text())["rank_pattern"]
    edit_config(folder, rank_pattern=pattern | {f"{V0}.lora_E": [False] * 6})
    update = read_update(folder)
    assert product(update, V0).shape == (32, 64)
    assert product(update, V0).abs().max() == 0


def test_it_can_be_exported_to_stock_lora(folder, tiny_model_dir, tmp_path):
    report = save_as_lora(folder, tmp_path / "lora")
    assert report.logits < 1e-5
    lora = PeftModel.from_pretrained(base_model(tiny_model_dir), tmp_path / "lora").eval()
    trained = PeftModel.from_pretrained(base_model(tiny_model_dir), folder).eval()
    torch.testing.assert_close(logits(lora), logits(trained), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["A", "B", "E"])
def test_a_missing_tensor_is_named(folder, part):
    edit_tensors(folder, lambda tensors: tensors.pop(f"{PREFIX}{Q0}.lora_{part}"))
    with pytest.raises(AdapterError, match=rf"tensor {Q0}\.lora_{part} is missing"):
        read_update(folder)


def test_a_rank_that_is_not_the_configurations_is_refused(folder):
    edit_config(folder, rank_pattern=None)
    with pytest.raises(AdapterError, match=r"rank .*, but the configuration says 6"):
        read_update(folder)


def test_factors_that_do_not_fit_each_other_are_refused(folder):
    edit_tensors(folder, lambda tensors: tensors.update({f"{PREFIX}{V0}.lora_E": torch.ones(9, 1)}))
    with pytest.raises(AdapterError, match=f"layer {V0}: .*not factors of a linear layer"):
        read_update(folder)


def test_an_adapter_that_trains_more_than_factors_is_refused(folder):
    edit_config(folder, bias="all")
    with pytest.raises(AdapterError, match="bias='all' trains biases"):
        read_update(folder)


def test_an_empty_adapter_is_refused(folder):
    edit_tensors(folder, lambda tensors: [tensors.pop(name) for name in list(tensors)])
    with pytest.raises(AdapterError, match="no lora_A, lora_B and lora_E tensors"):
        read_update(folder)
