"""The page on larger models follows from its formulas, and these are what the code stores."""

import csv

import peft
import torch
from safetensors.torch import load_file

import hiplora
from tests.tiny import tiny_llama
from tools import scaling


def test_the_table_is_that_of_the_formulas():
    with scaling.TABLE.open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [list(row) for row in scaling.rows()]


def test_an_adapter_stores_what_the_formulas_say(tmp_path):
    model = tiny_llama()
    config = hiplora.HipLoraConfig(task_type="CAUSAL_LM", r=3, principal_rank=4)
    ids = torch.arange(2, 66).reshape(2, 32)
    hiplora.calibrate(model, config, rows=ids)
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    adapted = {name: tensor for name, tensor in tensors.items() if ".hiplora_A" in name or ".hiplora_B" in name}
    cfg = model.config
    shape = scaling.Shape(0, cfg.num_hidden_layers, cfg.hidden_size, cfg.intermediate_size, 0)
    modules = scaling.mlp_modules(shape)
    assert sum(tensor.nbytes for tensor in adapted.values()) == scaling.adapter_bytes(modules, 3)
    rest = sum(tensor.nbytes for name, tensor in tensors.items() if name not in adapted)
    assert rest == scaling.factor_bytes(modules, 4)
