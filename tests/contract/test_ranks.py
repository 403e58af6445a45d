"""Principal ranks that are left to the layers: chosen, saved, loaded, exported."""

import json

import peft
import pytest
import torch

import hiplora
from hiplora.errors import AdapterError
from hiplora.tuner import hip_layers
from tests.contract.conftest import logits, train

SPECS = [0.25, "energy:0.8"]


def ranks(model):
    return {name: len(layer.hiplora_sigma["default"]) for name, layer in hip_layers(model)}


@pytest.mark.parametrize("basis", ["weight", "activation"])
@pytest.mark.parametrize("spec", SPECS)
def test_an_adapter_with_ranks_of_the_layers_own_survives_saving_and_export(tiny, ids, tmp_path, basis, spec):
    model = tiny.adapted(basis=basis, principal_rank=spec)
    train(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(tiny.make(), tmp_path / "adapter").eval()
    assert ranks(again) == ranks(model) == again.peft_config["default"].principal_ranks
    assert torch.equal(logits(again, ids), logits(model, ids))
    hiplora.export.save_as_lora(model, tmp_path / "live")
    hiplora.export.save_as_lora(tmp_path / "adapter", tmp_path / "lora", check_logits=False)
    for folder in ("live", "lora"):
        plain = peft.PeftModel.from_pretrained(tiny.make(), tmp_path / folder).eval()
        torch.testing.assert_close(logits(plain, ids), logits(model, ids), rtol=1e-4, atol=1e-5)


def test_a_file_that_lost_its_ranks_is_said_to_be_damaged(tiny, tmp_path):
    tiny.adapted(principal_rank=0.25).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"principal_ranks": {}}))
    with pytest.raises(AdapterError, match=r"q_proj: .*no principal_ranks entry"):
        peft.PeftModel.from_pretrained(tiny.make(), tmp_path)
